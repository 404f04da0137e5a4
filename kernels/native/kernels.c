/* Arithmetic on flat buffers for the CPU: fused optimizer updates, gradient passes, the split master.
 *
 * Every function works on one sub-range, starts no thread and keeps no state, so the caller decides how many cores
 * take part. Results are bit for bit those of the plain torch functions in ../reference: only +, -, *, / and sqrt,
 * each correctly rounded on its own. Build with -ffp-contract=off (see build.py), or multiply-adds would be fused
 * and round once where the definition rounds twice. Only the payload of a NaN is left open.
 *
 * The loops are plain C that the compiler vectorises. Each is instantiated for three instruction sets by inlining
 * one body into functions with different target attributes; which one runs is decided once, from the CPU.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define INDEPENDENT _Pragma("GCC ivdep") _Pragma("GCC unroll 1")
#endif
#define KEEP_SCALAR __asm__ volatile("") /* in the body of a loop over a short rest: not worth vector code */

/* ---- instruction sets ------------------------------------------------------------------------------------- */

enum { PORTABLE, AVX2, AVX512, NUM_ISAS };

#if defined(__x86_64__)
#define HAVE_X86 1
#else
#define HAVE_X86 0
#endif

static int best_isa(void)
{
#if HAVE_X86
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2")) return PORTABLE;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return AVX512;
    return AVX2;
#else
    return PORTABLE;
#endif
}

static int current_isa = PORTABLE;

/* Use at most this instruction set (for tests); returns the one in effect. */
EXPORT int offl_limit_isa(int limit)
{
    int best = best_isa();
    current_isa = limit < best ? limit : best;
    return current_isa;
}

__attribute__((constructor)) static void choose_isa(void) { current_isa = best_isa(); }

#ifndef OFFL_SOURCE_HASH
#define OFFL_SOURCE_HASH "unknown"
#endif
EXPORT const char *offl_source_hash(void) { return OFFL_SOURCE_HASH; }

/* ---- number formats --------------------------------------------------------------------------------------- */

enum { F32, BF16, F16, NUM_DTYPES };

INLINE float as_float(uint32_t bits) { float value; memcpy(&value, &bits, sizeof value); return value; }
INLINE uint32_t as_bits(float value) { uint32_t bits; memcpy(&bits, &value, sizeof bits); return bits; }

INLINE float float_from_half(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, magnitude = (uint32_t)(half & 0x7fff) << 13;
    uint32_t scaled = as_bits(as_float(magnitude) * 0x1p112f); /* moves the exponent bias, exact for subnormals too */
    return as_float(sign | (magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : scaled));
}

/* Round to nearest even; subnormals are rounded by adding 0.5, whose unit in the last place is half's 2^-24. */
INLINE uint16_t half_from_float(float value)
{
    uint32_t bits = as_bits(value), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
    uint32_t normal = (magnitude - 0x38000000u + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    uint32_t tiny = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u;
    uint32_t out = magnitude < 0x38800000u ? tiny : normal;
    out = magnitude >= 0x47800000u ? 0x7c00 : out;
    out = magnitude > 0x7f800000u ? 0x7e00 : out;
    return (uint16_t)(sign | out);
}

INLINE uint16_t bfloat_from_float(float value)
{
    uint32_t bits = as_bits(value), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)(value != value ? 0x7fc0 : rounded);
}

INLINE float load(const void *buffer, int dtype, int64_t i)
{
    if (dtype == F32) return ((const float *)buffer)[i];
    if (dtype == BF16) return as_float((uint32_t)((const uint16_t *)buffer)[i] << 16);
    return float_from_half(((const uint16_t *)buffer)[i]);
}

INLINE void store(void *buffer, int dtype, int64_t i, float value)
{
    if (dtype == F32) ((float *)buffer)[i] = value;
    else if (dtype == BF16) ((uint16_t *)buffer)[i] = bfloat_from_float(value);
    else ((uint16_t *)buffer)[i] = half_from_float(value);
}

/* ---- walking a range ------------------------------------------------------------------------------------------
 *
 * Division and square root fill the reorder window of a core long before enough loads are under way to keep the memory
 * busy: without prefetching the optimizers reach 80 % of the speed of a plain stream. So each block of elements first
 * asks for the block AHEAD elements further on. Asking past the end of a buffer is harmless. */

enum { BLOCK = 64, AHEAD = 1024, LINE_NBYTES = 64 };

INLINE void prefetch(const void *buffer, int size_nbytes, int64_t begin)
{
    const char *start = (const char *)buffer + (begin + AHEAD) * size_nbytes;
    for (int offset = 0; offset < BLOCK * size_nbytes; offset += LINE_NBYTES) __builtin_prefetch(start + offset, 0, 3);
}

INLINE int64_t at_most(int64_t value, int64_t limit) { return value < limit ? value : limit; }
INLINE int size_of(int dtype) { return dtype == F32 ? 4 : 2; }

/* Runs ELEMENT for i = 0 .. N - 1, and before each whole block of them PREFETCHES, which may name `begin`. */
#define WALK(N, PREFETCHES, ELEMENT)                                                                                \
    do {                                                                                                            \
        int64_t begin = 0;                                                                                          \
        for (; begin + BLOCK <= (N); begin += BLOCK) {                                                              \
            PREFETCHES;                                                                                             \
            INDEPENDENT for (int64_t i = begin; i < begin + BLOCK; i++) { ELEMENT; }                                \
        }                                                                                                           \
        for (int64_t i = begin; i < (N); i++) { ELEMENT; KEEP_SCALAR; }                                             \
    } while (0)

/* ---- the split master: bits = (high << 16) + sign_extend(low), high rounded half up, NaN made canonical ------ */

INLINE float join(uint16_t high, int16_t low) { return as_float(((uint32_t)high << 16) + (uint32_t)(int32_t)low); }

INLINE void split(float value, uint16_t *high, int16_t *low)
{
    uint32_t bits = value != value ? 0x7fc00000u : as_bits(value);
    *high = (uint16_t)((bits + 0x8000u) >> 16);
    *low = (int16_t)(uint16_t)bits;
}

INLINE float load_master(const void *param, const int16_t *low, int is_split, int64_t i)
{
    return is_split ? join(((const uint16_t *)param)[i], low[i]) : ((const float *)param)[i];
}

INLINE void store_master(void *param, int16_t *low, int is_split, int64_t i, float value)
{
    if (is_split) split(value, (uint16_t *)param + i, low + i);
    else ((float *)param)[i] = value;
}

INLINE void *master_at(void *param, int is_split, int64_t begin) { return (char *)param + begin * (is_split ? 2 : 4); }

INLINE void prefetch_master(const void *param, const int16_t *low, int is_split, int64_t begin)
{
    prefetch(param, is_split ? 2 : 4, begin);
    if (is_split) prefetch(low, 2, begin);
}

INLINE void split_body(int64_t n, const float *restrict master, uint16_t *restrict param, int16_t *restrict low)
{
    WALK(n, prefetch(master, 4, begin), split(master[i], param + i, low + i));
}

INLINE void join_body(int64_t n, float *restrict master, const uint16_t *restrict param, const int16_t *restrict low)
{
    WALK(n, (prefetch(param, 2, begin), prefetch(low, 2, begin)), master[i] = join(param[i], low[i]));
}

/* ---- Adam and AdamW: one pass; 26 B per element (split master, 16-bit gradient), 28 B (fp32 both) ------------ */

struct adam {
    float grad_scale, one_minus_beta1, beta2, one_minus_beta2, eps, step_size, decay, l2;
};

/* One element: `p`, `m` and `v` in place. */
INLINE void adam_update(float *p, float *m, float *v, float grad, struct adam f)
{
    float g = grad * f.grad_scale;
    float with_l2 = g + *p * f.l2;
    g = f.l2 != 0.0f ? with_l2 : g;
    *m = *m + (g - *m) * f.one_minus_beta1;
    *v = *v * f.beta2 + (g * g) * f.one_minus_beta2;
    float update = f.step_size * (*m / (sqrtf(*v) + f.eps));
    float with_decay = update + *p * f.decay;
    update = f.decay != 0.0f ? with_decay : update;
    *p -= update;
}

INLINE void adam_element(int is_split, int dtype, int64_t i, void *restrict param, int16_t *restrict low,
                         float *restrict exp_avg, float *restrict exp_avg_sq, const void *restrict grad, struct adam f)
{
    float p = load_master(param, low, is_split, i), m = exp_avg[i], v = exp_avg_sq[i];
    adam_update(&p, &m, &v, load(grad, dtype, i), f);
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    store_master(param, low, is_split, i, p);
}

INLINE void adam_body(int is_split, int dtype, int64_t n, void *restrict param, int16_t *restrict low,
                      float *restrict exp_avg, float *restrict exp_avg_sq, const void *restrict grad,
                      const struct adam *restrict factors)
{
    const struct adam f = *factors;
    WALK(n,
         (prefetch_master(param, low, is_split, begin), prefetch(exp_avg, 4, begin), prefetch(exp_avg_sq, 4, begin),
          prefetch(grad, size_of(dtype), begin)),
         adam_element(is_split, dtype, i, param, low, exp_avg, exp_avg_sq, grad, f));
}

/* ---- Adam with bf16 moments, rounded stochastically: 18 B per element ------------------------------------------- */

struct rounding {
    uint32_t key0, key1;
    uint64_t first_index; /* of the range in the whole: the random bits belong to the element, not to the call */
};

/* A 32-bit mixing function: xor-shifts and odd multipliers (C. Wellons, "hash prospector", lowbias32). */
INLINE uint32_t mix(uint32_t x)
{
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
}

/* For element `first_index + offset`; the high word takes the carry of the low one, which costs less than 64 bits. */
INLINE uint32_t random_bits(struct rounding r, uint64_t first_index, uint32_t offset)
{
    uint32_t low = (uint32_t)first_index + offset, high = (uint32_t)(first_index >> 32) + (low < offset);
    return mix(mix(low ^ r.key0) ^ high ^ r.key1);
}

/* Adds 16 random bits below the kept ones and cuts: rounds up with the probability of the discarded fraction. */
INLINE uint16_t round_stochastically(float value, uint32_t random)
{
    return (uint16_t)(value != value ? 0x7fc0u : (as_bits(value) + (random & 0xffff)) >> 16);
}

/* The gradient of a block in float: for the rarer forms, which are not instantiated for each gradient dtype. */
INLINE void load_block(int dtype, const void *restrict source, int64_t begin, int64_t count, float *restrict block)
{
    if (dtype == F32) memcpy(block, (const float *)source + begin, (size_t)count * sizeof(float));
    else if (dtype == BF16)
        for (int64_t i = 0; i < count; i++) block[i] = load(source, BF16, begin + i);
    else
        for (int64_t i = 0; i < count; i++) block[i] = load(source, F16, begin + i);
}

INLINE void adam_bf16_element(int is_split, int64_t i, void *restrict param, int16_t *restrict low,
                              uint16_t *restrict exp_avg, uint16_t *restrict exp_avg_sq, const float *restrict grad,
                              struct adam f, struct rounding r, uint64_t first_index)
{
    float p = load_master(param, low, is_split, i), m = load(exp_avg, BF16, i), v = load(exp_avg_sq, BF16, i);
    uint32_t random = random_bits(r, first_index, (uint32_t)i);
    adam_update(&p, &m, &v, grad[i], f);
    exp_avg[i] = round_stochastically(m, random);
    exp_avg_sq[i] = round_stochastically(v, random >> 16);
    store_master(param, low, is_split, i, p);
}

INLINE void adam_bf16_body(int is_split, int dtype, int64_t n, void *restrict param, int16_t *restrict low,
                           uint16_t *restrict exp_avg, uint16_t *restrict exp_avg_sq, const void *restrict grad,
                           const struct adam *factors, const struct rounding *rounding)
{
    float g[BLOCK];
    const struct adam f = *factors;
    const struct rounding r = *rounding;
    for (int64_t begin = 0; begin < n; begin += BLOCK) {
        int64_t count = at_most(n - begin, BLOCK);
        prefetch_master(param, low, is_split, begin);
        prefetch(exp_avg, 2, begin);
        prefetch(exp_avg_sq, 2, begin);
        prefetch(grad, size_of(dtype), begin);
        void *param_part = master_at(param, is_split, begin);
        int16_t *low_part = is_split ? low + begin : 0;
        uint16_t *m_part = exp_avg + begin, *v_part = exp_avg_sq + begin;
        uint64_t first = r.first_index + (uint64_t)begin;
        load_block(dtype, grad, begin, count, g);
        if (count == BLOCK)
            INDEPENDENT for (int64_t i = 0; i < BLOCK; i++)
                adam_bf16_element(is_split, i, param_part, low_part, m_part, v_part, g, f, r, first);
        else
            for (int64_t i = 0; i < count; i++) {
                adam_bf16_element(is_split, i, param_part, low_part, m_part, v_part, g, f, r, first);
                KEEP_SCALAR;
            }
    }
}

/* ---- Adam with 8-bit moments in blocks of 256 with one fp32 scale each: 14.06 B per element ------------------------
 *
 * exp_avg    = scale * sign(q) * (q / 127)^2, q in -127 .. 127; exp_avg_sq = scale * (q / 255)^4, q in 0 .. 255, never
 * 0 for a positive number. The scale is the largest magnitude of the block; when it is not finite the codes are 0, so
 * that the whole block reads as NaN. */

enum { QUANT_BLOCK = 256 };

/* To the nearest integer, ties to even, for 0 <= value < 2^22: adding 1.5 * 2^23 leaves it in the low bits. */
INLINE int32_t round_to_int(float value) { return (int32_t)(as_bits(value + 12582912.0f) - 0x4b400000u); }

INLINE float largest_magnitude(const float *values)
{
    uint32_t largest = 0; /* as integers, magnitudes are in order, and NaN lies above infinity */
    for (int i = 0; i < QUANT_BLOCK; i++) {
        uint32_t magnitude = as_bits(values[i]) & 0x7fffffff;
        largest = magnitude > largest ? magnitude : largest;
    }
    return as_float(largest);
}

INLINE void quantize_block(const float *restrict m, const float *restrict v, int8_t *restrict m_codes,
                           float *restrict m_scale, uint8_t *restrict v_codes, float *restrict v_scale)
{
    float scale_m = largest_magnitude(m), scale_v = largest_magnitude(v);
    *m_scale = scale_m;
    *v_scale = scale_v;
    const int32_t keep_m = -(scale_m > 0.0f && scale_m < INFINITY), keep_v = -(scale_v > 0.0f && scale_v < INFINITY);
    INDEPENDENT
    for (int64_t i = 0; i < QUANT_BLOCK; i++) {
        uint32_t bits = as_bits(m[i]);
        int32_t q = round_to_int(sqrtf(as_float(bits & 0x7fffffff) / scale_m) * 127.0f);
        int32_t negative = -(int32_t)(bits >> 31);
        m_codes[i] = (int8_t)(((q ^ negative) - negative) & keep_m);
    }
    INDEPENDENT
    for (int64_t i = 0; i < QUANT_BLOCK; i++) {
        int32_t q = round_to_int(sqrtf(sqrtf(v[i] / scale_v)) * 255.0f), smallest = as_bits(v[i]) != 0;
        q = q > smallest ? q : smallest;
        v_codes[i] = (uint8_t)(q & keep_v);
    }
}

INLINE void dequantize_block(float *restrict m, float *restrict v, const int8_t *restrict m_codes, float m_scale,
                             const uint8_t *restrict v_codes, float v_scale)
{
    INDEPENDENT
    for (int64_t i = 0; i < QUANT_BLOCK; i++) {
        int32_t q = m_codes[i], magnitude = q < 0 ? -q : q;
        m[i] = m_scale * ((float)(q * magnitude) * (1.0f / 16129.0f));
    }
    INDEPENDENT
    for (int64_t i = 0; i < QUANT_BLOCK; i++) {
        int32_t q = v_codes[i];
        float root = (float)(q * q) * (1.0f / 65025.0f);
        v[i] = v_scale * (root * root);
    }
}

INLINE void adam_8bit_body(int is_split, int dtype, int64_t n, void *restrict param, int16_t *restrict low,
                           int8_t *restrict m_codes, float *restrict m_scales, uint8_t *restrict v_codes,
                           float *restrict v_scales, const void *restrict grad, const struct adam *factors)
{
    float m[QUANT_BLOCK], v[QUANT_BLOCK], g[QUANT_BLOCK];
    int8_t m_rest[QUANT_BLOCK] = {0};
    uint8_t v_rest[QUANT_BLOCK] = {0};
    const struct adam f = *factors;
    for (int64_t begin = 0; begin < n; begin += QUANT_BLOCK) {
        int64_t count = at_most(n - begin, QUANT_BLOCK), block = begin / QUANT_BLOCK;
        void *param_part = master_at(param, is_split, begin);
        int16_t *low_part = is_split ? low + begin : 0;
        int8_t *m_part = m_codes + begin;
        uint8_t *v_part = v_codes + begin;
        if (count < QUANT_BLOCK) { /* the last block: zeros make it whole */
            memcpy(m_rest, m_part, (size_t)count), memcpy(v_rest, v_part, (size_t)count);
            m_part = m_rest, v_part = v_rest;
        }
        for (int64_t part = 0; part < QUANT_BLOCK; part += BLOCK) {
            prefetch_master(param, low, is_split, begin + part);
            prefetch(m_codes, 1, begin + part);
            prefetch(v_codes, 1, begin + part);
            prefetch(grad, size_of(dtype), begin + part);
        }
        dequantize_block(m, v, m_part, m_scales[block], v_part, v_scales[block]);
        load_block(dtype, grad, begin, count, g);
        INDEPENDENT
        for (int64_t i = 0; i < count; i++)
            adam_element(is_split, F32, i, param_part, low_part, m, v, g, f);
        for (int64_t i = count; i < QUANT_BLOCK; i++) m[i] = v[i] = 0.0f;
        quantize_block(m, v, m_part, m_scales + block, v_part, v_scales + block);
        if (count < QUANT_BLOCK)
            memcpy(m_codes + begin, m_rest, (size_t)count), memcpy(v_codes + begin, v_rest, (size_t)count);
    }
}

/* ---- SGD with momentum: one pass; 18 B per element (split master, momentum, 16-bit gradient) --------------------- */

struct sgd {
    float grad_scale, lr, momentum, one_minus_dampening, l2;
    int32_t nesterov, first;
};

INLINE void sgd_element(int is_split, int dtype, int has_buffer, int64_t i, void *restrict param,
                        int16_t *restrict low, float *restrict buffer, const void *restrict grad, struct sgd f)
{
    float p = load_master(param, low, is_split, i);
    float g = load(grad, dtype, i) * f.grad_scale;
    float with_l2 = g + p * f.l2;
    g = f.l2 != 0.0f ? with_l2 : g;
    if (has_buffer) {
        float heavy = buffer[i] * f.momentum + g * f.one_minus_dampening;
        float b = f.first ? g : heavy;
        float ahead = g + b * f.momentum;
        buffer[i] = b;
        g = f.nesterov ? ahead : b;
    }
    store_master(param, low, is_split, i, p - g * f.lr);
}

INLINE void sgd_body(int is_split, int dtype, int has_buffer, int64_t n, void *restrict param, int16_t *restrict low,
                     float *restrict buffer, const void *restrict grad, const struct sgd *restrict factors)
{
    const struct sgd f = *factors;
    WALK(n,
         (prefetch_master(param, low, is_split, begin), prefetch(grad, size_of(dtype), begin),
          prefetch(has_buffer ? (const void *)buffer : grad, has_buffer ? 4 : size_of(dtype), begin)),
         sgd_element(is_split, dtype, has_buffer, i, param, low, buffer, grad, f));
}

/* ---- gradients: sums in a fixed order, copies, accumulation ------------------------------------------------------ */

enum { SUM_BLOCK = 4096, SUM_LANES = 512 };

/* Dot product of one block of 4096: the products are folded in half twelve times, s[i] += s[i + half], in float64.
 * The first three folds stay in registers. A product of two floats is exact in float64 and cannot overflow there. */
INLINE double block_dot(int dtype, const void *restrict a, const void *restrict b, int64_t start)
{
    double lane[SUM_LANES];
#define PRODUCT(ROW) ((double)load(a, dtype, start + (ROW) * SUM_LANES + j) * \
                      (double)load(b, dtype, start + (ROW) * SUM_LANES + j))
    for (int64_t part = 0; part < SUM_LANES; part += BLOCK) {
        for (int64_t row = 0; row < 8; row++) {
            const char *ahead = (const char *)a + (start + SUM_BLOCK + row * SUM_LANES + part) * size_of(dtype);
            for (int line = 0; line < BLOCK * size_of(dtype); line += LINE_NBYTES)
                __builtin_prefetch(ahead + line, 0, 3);
        }
        for (int64_t j = part; j < part + BLOCK; j++) {
            double even = (PRODUCT(0) + PRODUCT(4)) + (PRODUCT(2) + PRODUCT(6));
            double odd = (PRODUCT(1) + PRODUCT(5)) + (PRODUCT(3) + PRODUCT(7));
            lane[j] = even + odd;
        }
    }
#undef PRODUCT
    for (int64_t half = SUM_LANES / 2; half; half /= 2)
        for (int64_t j = 0; j < half; j++) lane[j] += lane[j + half];
    return lane[0];
}

/* Sum of squares of `count` elements from `start` on, at most a block of them. */
INLINE double block_squares(int dtype, const void *restrict source, int64_t start, int64_t count)
{
    if (count == SUM_BLOCK) return block_dot(dtype, source, source, start);
    float padded[SUM_BLOCK] = {0};
    for (int64_t i = 0; i < count; i++) padded[i] = load(source, dtype, start + i);
    return block_dot(F32, padded, padded, 0);
}

INLINE double norm_body(int dtype, int64_t n, const void *restrict source)
{
    double sum = 0.0;
    for (int64_t start = 0; start < n; start += SUM_BLOCK)
        sum += block_squares(dtype, source, start, at_most(n - start, SUM_BLOCK));
    return sum;
}

INLINE void copy_body(int to, int from, int64_t n, void *restrict target, const void *restrict source)
{
    WALK(n, prefetch(source, size_of(from), begin), store(target, to, i, load(source, from, i)));
}

INLINE void accumulate_body(int to, int from, int64_t n, void *restrict target, const void *restrict source)
{
    WALK(n, (prefetch(target, size_of(to), begin), prefetch(source, size_of(from), begin)),
         store(target, to, i, load(target, to, i) + load(source, from, i)));
}

INLINE void scale_body(int dtype, int64_t n, void *restrict target, float factor)
{
    WALK(n, prefetch(target, size_of(dtype), begin), store(target, dtype, i, load(target, dtype, i) * factor));
}

/* sums[0..2] = <w,g>, <w,w>, <g,g> of master weights and gradient (perpGrad, arXiv 2501.04697). */
INLINE void projection_sums_body(int is_split, int dtype, int64_t n, const void *restrict param,
                                 const int16_t *restrict low, const void *restrict grad, double *restrict sums)
{
    float w[SUM_BLOCK], g[SUM_BLOCK];
    sums[0] = sums[1] = sums[2] = 0.0;
    for (int64_t start = 0; start < n; start += SUM_BLOCK) {
        int64_t count = at_most(n - start, SUM_BLOCK);
        for (int64_t i = 0; i < count; i++) {
            w[i] = load_master(param, low, is_split, start + i);
            g[i] = load(grad, dtype, start + i);
        }
        for (int64_t i = count; i < SUM_BLOCK; i++) w[i] = g[i] = 0.0f;
        sums[0] += block_dot(F32, w, g, 0);
        sums[1] += block_dot(F32, w, w, 0);
        sums[2] += block_dot(F32, g, g, 0);
    }
}

INLINE void project_body(int is_split, int dtype, int64_t n, const void *restrict param, const int16_t *restrict low,
                         void *restrict grad, float coefficient, float rescale)
{
    WALK(n, (prefetch_master(param, low, is_split, begin), prefetch(grad, size_of(dtype), begin)),
         store(grad, dtype, i, (load(grad, dtype, i) - load_master(param, low, is_split, i) * coefficient) * rescale));
}

/* ---- the roof: what the memory gives to a pass with the same streams and next to no arithmetic --------------- */

struct stream {
    void *data;
    int32_t size_nbytes; /* per element: 1, 2, 4 */
    int32_t mode;        /* 0 read, 1 read and write in place, 2 write */
};

INLINE uint64_t stream_block(struct stream s, int size_nbytes, int64_t begin)
{
    uint64_t *words = (uint64_t *)((char *)s.data + begin * size_nbytes), sum = 0;
    if (s.mode != 2) prefetch(s.data, size_nbytes, begin);
    for (int i = 0; i < BLOCK * size_nbytes / 8; i++) {
        if (s.mode == 0) sum += words[i];
        else words[i] = s.mode == 1 ? words[i] + 1 : 1;
    }
    return sum;
}

INLINE uint64_t stream_body(int64_t n, int num_streams, const struct stream *streams)
{
    uint64_t sum = 0;
    for (int64_t begin = 0; begin + BLOCK <= n; begin += BLOCK)
        for (int k = 0; k < num_streams; k++) {
            struct stream s = streams[k];
            sum += s.size_nbytes == 4   ? stream_block(s, 4, begin)
                   : s.size_nbytes == 2 ? stream_block(s, 2, begin)
                                        : stream_block(s, 1, begin);
        }
    return sum;
}

/* ---- one function per instruction set, and the exported entry that picks it ----------------------------------- */

#define FOR_DTYPE(DTYPE, CALL)                                                                                      \
    switch (DTYPE) {                                                                                                \
    case F32: { enum { D = F32 }; CALL; } break;                                                                    \
    case BF16: { enum { D = BF16 }; CALL; } break;                                                                  \
    default: { enum { D = F16 }; CALL; } break;                                                                     \
    }
#define FOR_DTYPES(TO, FROM, CALL)                                                                                  \
    switch ((TO) * NUM_DTYPES + (FROM)) {                                                                           \
    case 0: { enum { T = F32, S = F32 }; CALL; } break;                                                             \
    case 1: { enum { T = F32, S = BF16 }; CALL; } break;                                                            \
    case 2: { enum { T = F32, S = F16 }; CALL; } break;                                                             \
    case 3: { enum { T = BF16, S = F32 }; CALL; } break;                                                            \
    case 4: { enum { T = BF16, S = BF16 }; CALL; } break;                                                           \
    case 5: { enum { T = BF16, S = F16 }; CALL; } break;                                                            \
    case 6: { enum { T = F16, S = F32 }; CALL; } break;                                                             \
    case 7: { enum { T = F16, S = BF16 }; CALL; } break;                                                            \
    default: { enum { T = F16, S = F16 }; CALL; } break;                                                            \
    }

#define FOR_SPLIT(CALL)                                                                                             \
    if (low) { enum { SPLIT = 1 }; CALL; }                                                                          \
    else { enum { SPLIT = 0 }; CALL; }
#define FOR_MASTER(DTYPE, CALL) FOR_SPLIT(FOR_DTYPE(DTYPE, CALL))

/* One row per exported function: what it returns, its name, its parameters, its arguments, and the body to inline. */
#define KERNELS(K)                                                                                                  \
    K(void, adam,                                                                                                   \
      (int dtype, int64_t n, void *param, int16_t *low, float *exp_avg, float *exp_avg_sq, const void *grad,        \
       const struct adam *f),                                                                                       \
      (dtype, n, param, low, exp_avg, exp_avg_sq, grad, f),                                                         \
      FOR_MASTER(dtype, adam_body(SPLIT, D, n, param, low, exp_avg, exp_avg_sq, grad, f)))                          \
    K(void, adam_bf16,                                                                                              \
      (int dtype, int64_t n, void *param, int16_t *low, uint16_t *exp_avg, uint16_t *exp_avg_sq, const void *grad,  \
       const struct adam *f, const struct rounding *r),                                                             \
      (dtype, n, param, low, exp_avg, exp_avg_sq, grad, f, r),                                                      \
      FOR_SPLIT(adam_bf16_body(SPLIT, dtype, n, param, low, exp_avg, exp_avg_sq, grad, f, r)))                      \
    K(void, adam_8bit,                                                                                              \
      (int dtype, int64_t n, void *param, int16_t *low, int8_t *m_codes, float *m_scales, uint8_t *v_codes,         \
       float *v_scales, const void *grad, const struct adam *f),                                                    \
      (dtype, n, param, low, m_codes, m_scales, v_codes, v_scales, grad, f),                                        \
      FOR_SPLIT(adam_8bit_body(SPLIT, dtype, n, param, low, m_codes, m_scales, v_codes, v_scales, grad, f)))        \
    K(void, sgd,                                                                                                    \
      (int dtype, int64_t n, void *param, int16_t *low, float *buffer, const void *grad, const struct sgd *f),      \
      (dtype, n, param, low, buffer, grad, f),                                                                      \
      if (buffer) { FOR_MASTER(dtype, sgd_body(SPLIT, D, 1, n, param, low, buffer, grad, f)) }                      \
      else { FOR_MASTER(dtype, sgd_body(SPLIT, D, 0, n, param, low, buffer, grad, f)) })                            \
    K(double, squared_norm, (int dtype, int64_t n, const void *source), (dtype, n, source),                         \
      FOR_DTYPE(dtype, return norm_body(D, n, source)))                                                             \
    K(void, copy, (int to, int from, int64_t n, void *target, const void *source), (to, from, n, target, source),   \
      FOR_DTYPES(to, from, copy_body(T, S, n, target, source)))                                                     \
    K(void, accumulate, (int to, int from, int64_t n, void *target, const void *source),                            \
      (to, from, n, target, source), FOR_DTYPES(to, from, accumulate_body(T, S, n, target, source)))                \
    K(void, scale, (int dtype, int64_t n, void *target, float factor), (dtype, n, target, factor),                  \
      FOR_DTYPE(dtype, scale_body(D, n, target, factor)))                                                           \
    K(void, projection_sums,                                                                                        \
      (int dtype, int64_t n, const void *param, const int16_t *low, const void *grad, double *sums),                \
      (dtype, n, param, low, grad, sums),                                                                           \
      FOR_MASTER(dtype, projection_sums_body(SPLIT, D, n, param, low, grad, sums)))                                 \
    K(void, project,                                                                                                \
      (int dtype, int64_t n, const void *param, const int16_t *low, void *grad, float coefficient, float rescale),  \
      (dtype, n, param, low, grad, coefficient, rescale),                                                           \
      FOR_MASTER(dtype, project_body(SPLIT, D, n, param, low, grad, coefficient, rescale)))                         \
    K(void, split, (int64_t n, const float *master, uint16_t *param, int16_t *low), (n, master, param, low),        \
      split_body(n, master, param, low))                                                                            \
    K(void, join, (int64_t n, float *master, const uint16_t *param, const int16_t *low), (n, master, param, low),   \
      join_body(n, master, param, low))                                                                             \
    K(uint64_t, stream, (int64_t n, int num_streams, const struct stream *streams), (n, num_streams, streams),      \
      return stream_body(n, num_streams, streams))

#define PORTABLE_VERSION(RETURN, NAME, PARAMETERS, ARGUMENTS, ...)                                                  \
    static RETURN NAME##_portable PARAMETERS { __VA_ARGS__; }
KERNELS(PORTABLE_VERSION)

#if HAVE_X86
#define AVX2_VERSION(RETURN, NAME, PARAMETERS, ARGUMENTS, ...)                                                      \
    __attribute__((target("avx2,f16c"))) static RETURN NAME##_avx2 PARAMETERS { __VA_ARGS__; }
KERNELS(AVX2_VERSION)
#define AVX512_VERSION(RETURN, NAME, PARAMETERS, ARGUMENTS, ...)                                                    \
    __attribute__((target("avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl"))) static RETURN NAME##_avx512 PARAMETERS  \
    {                                                                                                               \
        __VA_ARGS__;                                                                                                \
    }
KERNELS(AVX512_VERSION)
#define PICK(NAME) (current_isa == AVX512 ? NAME##_avx512 : current_isa == AVX2 ? NAME##_avx2 : NAME##_portable)
#else
#define PICK(NAME) NAME##_portable
#endif

#define EXPORTED(RETURN, NAME, PARAMETERS, ARGUMENTS, ...)                                                          \
    EXPORT RETURN offl_##NAME PARAMETERS { return PICK(NAME) ARGUMENTS; }
KERNELS(EXPORTED)

/* Copy (or add) and the sum of squares of what the target then holds, while a block is in the cache. */
static double gather(int to, int from, int accumulate, int64_t n, void *target, const void *source)
{
    double sum = 0.0;
    for (int64_t start = 0; start < n; start += SUM_BLOCK) {
        int64_t count = at_most(n - start, SUM_BLOCK);
        char *part = (char *)target + start * size_of(to);
        const char *from_part = (const char *)source + start * size_of(from);
        if (accumulate) PICK(accumulate)(to, from, count, part, from_part);
        else PICK(copy)(to, from, count, part, from_part);
        sum += PICK(squared_norm)(to, count, part);
    }
    return sum;
}

EXPORT double offl_copy_squared_norm(int to, int from, int64_t n, void *target, const void *source)
{
    return gather(to, from, 0, n, target, source);
}

EXPORT double offl_accumulate_squared_norm(int to, int from, int64_t n, void *target, const void *source)
{
    return gather(to, from, 1, n, target, source);
}
