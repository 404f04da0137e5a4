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
#define INDEPENDENT _Pragma("GCC ivdep")
#endif

/* ---- instruction sets ------------------------------------------------------------------------------------- */

enum { PORTABLE, AVX2, AVX512, NUM_ISAS };

#if defined(__x86_64__)
#define HAVE_X86 1
#define TARGET_PORTABLE
#define TARGET_AVX2 __attribute__((target("avx2,f16c")))
#define TARGET_AVX512 __attribute__((target("avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl")))
#else
#define HAVE_X86 0
#define TARGET_PORTABLE
#define TARGET_AVX2
#define TARGET_AVX512
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

/* ---- prefetching ----------------------------------------------------------------------------------------------
 *
 * Division and square root fill the reorder window of a core long before enough loads are under way to keep the memory
 * busy, so each block of elements first asks for the block AHEAD_NBYTES further on. Asking past the end is harmless. */

#ifndef AHEAD
#define AHEAD 1024
#endif
#ifndef LOC
#define LOC 3
#endif
#ifndef BLK
#define BLK 64
#endif
enum { BLOCK = BLK, LINE_NBYTES = 64 };

INLINE void prefetch(const void *buffer, int size_nbytes, int64_t begin)
{
    const char *start = (const char *)buffer + begin * size_nbytes + AHEAD*size_nbytes;
    for (int line = 0; line < BLOCK * size_nbytes; line += LINE_NBYTES) __builtin_prefetch(start + line, 0, LOC);
}

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

/* ---- Adam and AdamW: one pass; per element 26 B (split master, 16-bit gradient) or 28 B (fp32 master, fp32 gradient) */

struct adam {
    float grad_scale, one_minus_beta1, beta2, one_minus_beta2, rsqrt_bias2, eps, step_size, decay, l2;
};

INLINE void adam_element(int is_split, int dtype, int64_t i, void *restrict param, int16_t *restrict low,
                         float *restrict exp_avg, float *restrict exp_avg_sq, const void *restrict grad, struct adam f)
{
    float p = load_master(param, low, is_split, i);
    float g = load(grad, dtype, i) * f.grad_scale;
    float with_l2 = g + p * f.l2;
    g = f.l2 != 0.0f ? with_l2 : g;
    float m = exp_avg[i] + (g - exp_avg[i]) * f.one_minus_beta1;
    float v = exp_avg_sq[i] * f.beta2 + (g * g) * f.one_minus_beta2;
    float update = f.step_size * (m / (sqrtf(v) * f.rsqrt_bias2 + f.eps));
    float with_decay = update + p * f.decay;
    update = f.decay != 0.0f ? with_decay : update;
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    store_master(param, low, is_split, i, p - update);
}

INLINE void adam_body(int is_split, int dtype, int64_t n, void *restrict param, int16_t *restrict low,
                      float *restrict exp_avg, float *restrict exp_avg_sq, const void *restrict grad,
                      const struct adam *restrict factors)
{
    const struct adam f = *factors;
    int64_t begin = 0;
    for (; begin + BLOCK <= n; begin += BLOCK) {
        prefetch(param, is_split ? 2 : 4, begin);
        if (is_split) prefetch(low, 2, begin);
        prefetch(exp_avg, 4, begin);
        prefetch(exp_avg_sq, 4, begin);
        prefetch(grad, dtype == F32 ? 4 : 2, begin);
        INDEPENDENT
        for (int64_t i = begin; i < begin + BLOCK; i++)
            adam_element(is_split, dtype, i, param, low, exp_avg, exp_avg_sq, grad, f);
    }
    for (; begin < n; begin++) adam_element(is_split, dtype, begin, param, low, exp_avg, exp_avg_sq, grad, f);
}

/* ---- SGD with momentum: one pass; per element 18 B (split master, momentum, 16-bit gradient) ------------------ */

struct sgd {
    float grad_scale, lr, momentum, one_minus_dampening, l2;
    int32_t nesterov, first;
};

INLINE void sgd_body(int is_split, int dtype, int64_t n, void *restrict param, int16_t *restrict low,
                     float *restrict buffer, const void *restrict grad, const struct sgd *restrict factors)
{
    const struct sgd f = *factors;
    const int has_l2 = f.l2 != 0.0f;
    INDEPENDENT
    for (int64_t i = 0; i < n; i++) {
        float p = load_master(param, low, is_split, i);
        float g = load(grad, dtype, i) * f.grad_scale;
        float with_l2 = g + p * f.l2;
        g = has_l2 ? with_l2 : g;
        if (buffer) {
            float heavy = buffer[i] * f.momentum + g * f.one_minus_dampening;
            float b = f.first ? g : heavy;
            float ahead = g + b * f.momentum;
            buffer[i] = b;
            g = f.nesterov ? ahead : b;
        }
        store_master(param, low, is_split, i, p - g * f.lr);
    }
}

/* ---- gradients ---------------------------------------------------------------------------------------------- */

enum { NORM_BLOCK = 4096, NORM_LANES = 512 };

/* Sum of squares of one block of 4096: the block is folded in half twelve times, s[i] += s[i + half], in float64.
 * The first three folds stay in registers. A square of a float is exact in float64, and cannot overflow there. */
INLINE double block_squared_norm(int dtype, int64_t count, const void *restrict source, int64_t start)
{
    double lane[NORM_LANES];
    float padded[NORM_BLOCK];
    if (count < NORM_BLOCK) {
        memset(padded, 0, sizeof padded);
        for (int64_t i = 0; i < count; i++) padded[i] = load(source, dtype, start + i);
        source = padded, dtype = F32, start = 0;
    }
#define SQUARE(ROW) ((double)load(source, dtype, start + (ROW) * NORM_LANES + j) * \
                     (double)load(source, dtype, start + (ROW) * NORM_LANES + j))
    for (int64_t j = 0; j < NORM_LANES; j++) {
        double even = (SQUARE(0) + SQUARE(4)) + (SQUARE(2) + SQUARE(6));
        double odd = (SQUARE(1) + SQUARE(5)) + (SQUARE(3) + SQUARE(7));
        lane[j] = even + odd;
    }
#undef SQUARE
    for (int64_t half = NORM_LANES / 2; half; half /= 2)
        for (int64_t j = 0; j < half; j++) lane[j] += lane[j + half];
    return lane[0];
}

INLINE double norm_body(int dtype, int64_t n, const void *restrict source)
{
    double sum = 0.0;
    for (int64_t start = 0; start < n; start += NORM_BLOCK)
        sum += n - start >= NORM_BLOCK ? block_squared_norm(dtype, NORM_BLOCK, source, start)
                                       : block_squared_norm(dtype, n - start, source, start);
    return sum;
}

INLINE void copy_body(int to, int from, int64_t n, void *restrict target, const void *restrict source)
{
    INDEPENDENT
    for (int64_t i = 0; i < n; i++) store(target, to, i, load(source, from, i));
}

INLINE void accumulate_body(int to, int from, int64_t n, void *restrict target, const void *restrict source)
{
    INDEPENDENT
    for (int64_t i = 0; i < n; i++) store(target, to, i, load(target, to, i) + load(source, from, i));
}

INLINE void split_body(int64_t n, const float *restrict master, uint16_t *restrict param, int16_t *restrict low)
{
    INDEPENDENT
    for (int64_t i = 0; i < n; i++) split(master[i], param + i, low + i);
}

INLINE void join_body(int64_t n, float *restrict master, const uint16_t *restrict param, const int16_t *restrict low)
{
    INDEPENDENT
    for (int64_t i = 0; i < n; i++) master[i] = join(param[i], low[i]);
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

#define INSTANTIATE(ISA, TARGET)                                                                                    \
    TARGET static void adam_##ISA(int dtype, int64_t n, void *param, int16_t *low, float *exp_avg,                  \
                                  float *exp_avg_sq, const void *grad, const struct adam *f)                        \
    {                                                                                                               \
        if (low) { FOR_DTYPE(dtype, adam_body(1, D, n, param, low, exp_avg, exp_avg_sq, grad, f)) }                 \
        else { FOR_DTYPE(dtype, adam_body(0, D, n, param, 0, exp_avg, exp_avg_sq, grad, f)) }                       \
    }                                                                                                               \
    TARGET static void sgd_##ISA(int dtype, int64_t n, void *param, int16_t *low, float *buffer, const void *grad,  \
                                 const struct sgd *f)                                                               \
    {                                                                                                               \
        if (low && buffer) { FOR_DTYPE(dtype, sgd_body(1, D, n, param, low, buffer, grad, f)) }                     \
        else if (low) { FOR_DTYPE(dtype, sgd_body(1, D, n, param, low, 0, grad, f)) }                               \
        else if (buffer) { FOR_DTYPE(dtype, sgd_body(0, D, n, param, 0, buffer, grad, f)) }                         \
        else { FOR_DTYPE(dtype, sgd_body(0, D, n, param, 0, 0, grad, f)) }                                          \
    }                                                                                                               \
    TARGET static double norm_##ISA(int dtype, int64_t n, const void *source)                                       \
    {                                                                                                               \
        double sum = 0.0;                                                                                           \
        FOR_DTYPE(dtype, sum = norm_body(D, n, source))                                                             \
        return sum;                                                                                                 \
    }                                                                                                               \
    TARGET static void copy_##ISA(int to, int from, int64_t n, void *target, const void *source)                    \
    {                                                                                                               \
        FOR_DTYPES(to, from, copy_body(T, S, n, target, source))                                                    \
    }                                                                                                               \
    TARGET static void accumulate_##ISA(int to, int from, int64_t n, void *target, const void *source)              \
    {                                                                                                               \
        FOR_DTYPES(to, from, accumulate_body(T, S, n, target, source))                                              \
    }                                                                                                               \
    TARGET static void split_##ISA(int64_t n, const float *master, uint16_t *param, int16_t *low)                   \
    {                                                                                                               \
        split_body(n, master, param, low);                                                                          \
    }                                                                                                               \
    TARGET static void join_##ISA(int64_t n, float *master, const uint16_t *param, const int16_t *low)              \
    {                                                                                                               \
        join_body(n, master, param, low);                                                                           \
    }

INSTANTIATE(portable, TARGET_PORTABLE)
#if HAVE_X86
INSTANTIATE(avx2, TARGET_AVX2)
INSTANTIATE(avx512, TARGET_AVX512)
#define PICK(NAME) (current_isa == AVX512 ? NAME##_avx512 : current_isa == AVX2 ? NAME##_avx2 : NAME##_portable)
#else
#define PICK(NAME) NAME##_portable
#endif

EXPORT void offl_adam(int dtype, int64_t n, void *param, int16_t *low, float *exp_avg, float *exp_avg_sq,
                      const void *grad, const struct adam *factors)
{
    PICK(adam)(dtype, n, param, low, exp_avg, exp_avg_sq, grad, factors);
}

EXPORT void offl_sgd(int dtype, int64_t n, void *param, int16_t *low, float *buffer, const void *grad,
                     const struct sgd *factors)
{
    PICK(sgd)(dtype, n, param, low, buffer, grad, factors);
}

EXPORT double offl_squared_norm(int dtype, int64_t n, const void *source) { return PICK(norm)(dtype, n, source); }

EXPORT void offl_copy(int to, int from, int64_t n, void *target, const void *source)
{
    PICK(copy)(to, from, n, target, source);
}

EXPORT void offl_accumulate(int to, int from, int64_t n, void *target, const void *source)
{
    PICK(accumulate)(to, from, n, target, source);
}

EXPORT void offl_split(int64_t n, const float *master, uint16_t *param, int16_t *low)
{
    PICK(split)(n, master, param, low);
}

EXPORT void offl_join(int64_t n, float *master, const uint16_t *param, const int16_t *low)
{
    PICK(join)(n, master, param, low);
}
