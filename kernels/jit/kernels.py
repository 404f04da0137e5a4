"""Arithmetic on flat buffers, compiled by numba: the exported functions of native/kernels.c with the same parameters.

Each function works block by block. A block is widened to float32 in scratch memory that stays in the first cache,
computed there, and narrowed again; so one body serves all dtypes, and every loop knows few pointers. LLVM vectorises
a loop only if it can tell at run time that its pointers do not overlap, and gives up when there are many.

Bits are those of ../reference: +, -, *, / and sqrt in float32, each rounded on its own. Numba allows LLVM neither to
contract nor to reorder unless `fastmath` is given. Integers are cut to 32 bits by hand, because numba computes them
in 64, and constants are np.float32, because a Python float would make the whole term float64.

All of it stands in one file: numba looks for changes only in the file of the function that it caches.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

BLOCK = 1024  # elements
SUM_BLOCK, SUM_LANES = 4096, 512
QUANT_BLOCK = 256
F32, BF16 = 0, 1  # dtype codes of ..native.calls; the third one, 2, is fp16

_ONE_HALF, _HALF_BIAS = np.float32(0.5), np.float32(2.0**112)
_ROUNDER = np.float32(1.5 * 2.0**23)  # adding it to 0 <= x < 2^22 leaves x, rounded to nearest even, in the low bits
_PER_127_SQUARED, _PER_255_SQUARED = np.float32(1.0) / np.float32(16129.0), np.float32(1.0) / np.float32(65025.0)
_127, _255, _ZERO = np.float32(127.0), np.float32(255.0), np.float32(0.0)
_INFINITY = np.float32(np.inf)

inner = njit(error_model="numpy")  # division by zero gives an infinity, and no test stands in the loop


# ---- memory at an address ---------------------------------------------------------------------------------------


@intrinsic
def pointer(typing_context, address):
    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


@inner
def floats(address, begin, count):
    return carray(pointer(address + begin * 4), count, np.float32)


@inner
def halves(address, begin, count):
    return carray(pointer(address + begin * 2), count, np.uint16)


@intrinsic
def bits(typing_context, value):
    """The pattern of a float32 as uint32."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], cgutils.int32_t)

    return types.uint32(types.float32), generate


@intrinsic
def real(typing_context, pattern):
    """The float32 that has this uint32 as its pattern."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


# ---- number formats: see the C source for why the formulas are right -----------------------------------------------


@inner
def float_from_bfloat(half):
    return real(np.uint32(half) << np.uint32(16))


@inner
def bfloat_from_float(value):
    pattern = bits(value)
    rounded = np.uint32(pattern + np.uint32(0x7FFF) + ((pattern >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.uint16(0x7FC0) if value != value else np.uint16(rounded)


@inner
def float_from_half(half):
    sign = np.uint32(np.uint32(half & np.uint16(0x8000)) << np.uint32(16))
    magnitude = np.uint32(np.uint32(half & np.uint16(0x7FFF)) << np.uint32(13))
    scaled = bits(real(magnitude) * _HALF_BIAS)
    special = np.uint32(magnitude | np.uint32(0x7F800000))
    return real(sign | (special if magnitude >= np.uint32(0x0F800000) else scaled))


@inner
def half_from_float(value):
    pattern = bits(value)
    sign = np.uint32(pattern >> np.uint32(16)) & np.uint32(0x8000)
    magnitude = np.uint32(pattern & np.uint32(0x7FFFFFFF))
    odd = np.uint32(magnitude >> np.uint32(13)) & np.uint32(1)
    normal = np.uint32(np.uint32(magnitude - np.uint32(0x38000000) + np.uint32(0xFFF) + odd) >> np.uint32(13))
    tiny = np.uint32(bits(real(magnitude) + _ONE_HALF) - np.uint32(0x3F000000))
    out = tiny if magnitude < np.uint32(0x38800000) else normal
    out = np.uint32(0x7C00) if magnitude >= np.uint32(0x47800000) else out
    out = np.uint32(0x7E00) if magnitude > np.uint32(0x7F800000) else out
    return np.uint16(sign | out)


@inner
def load_block(dtype, source, begin, count, scratch):
    """`count` elements as float32: the memory itself where it is float32, else `scratch`."""
    if dtype == F32:
        return floats(source, begin, count)
    narrow, out = halves(source, begin, count), scratch[:count]
    if dtype == BF16:
        for i in range(count):
            out[i] = float_from_bfloat(narrow[i])
    else:
        for i in range(count):
            out[i] = float_from_half(narrow[i])
    return out


@inner
def store_block(dtype, target, begin, count, values):
    """Round `values` to the dtype of the target; nothing is done where they lie there already."""
    if dtype == F32:
        out = floats(target, begin, count)
        if out.ctypes.data != values.ctypes.data:
            for i in range(count):
                out[i] = values[i]
    elif dtype == BF16:
        narrow = halves(target, begin, count)
        for i in range(count):
            narrow[i] = bfloat_from_float(values[i])
    else:
        narrow = halves(target, begin, count)
        for i in range(count):
            narrow[i] = half_from_float(values[i])


@inner
def at_most(value, limit):
    return value if value < limit else limit


# ---- the split master -------------------------------------------------------------------------------------------


@inner
def join_block(param, low, begin, count, master):
    high, low_half = halves(param, begin, count), halves(low, begin, count)
    for i in range(count):
        extended = np.uint32(np.int32(np.int16(low_half[i])))
        master[i] = real(np.uint32(np.uint32(high[i]) << np.uint32(16)) + extended)


@inner
def split_block(master, param, low, begin, count):
    high, low_half = halves(param, begin, count), halves(low, begin, count)
    for i in range(count):
        value = master[i]
        pattern = np.uint32(0x7FC00000) if value != value else bits(value)
        high[i] = np.uint16(np.uint32(pattern + np.uint32(0x8000)) >> np.uint32(16))
        low_half[i] = np.uint16(pattern)


@inner
def load_master(param, low, begin, count, scratch):
    if low == 0:
        return floats(param, begin, count)
    master = scratch[:count]
    join_block(param, low, begin, count, master)
    return master


@inner
def store_master(master, param, low, begin, count):
    if low != 0:
        split_block(master, param, low, begin, count)


def split(n, master, param, low):
    for begin in range(0, n, BLOCK):
        count = at_most(n - begin, BLOCK)
        split_block(floats(master, begin, count), param, low, begin, count)


def join(n, master, param, low):
    for begin in range(0, n, BLOCK):
        count = at_most(n - begin, BLOCK)
        join_block(param, low, begin, count, floats(master, begin, count))


# ---- Adam and AdamW ---------------------------------------------------------------------------------------------


@inner
def adam_block(p, m, v, grad, f):
    """One block in place; `f` holds the fields of `struct adam`."""
    grad_scale, one_minus_beta1, beta2, one_minus_beta2 = f[0], f[1], f[2], f[3]
    eps, step_size, decay, l2 = f[4], f[5], f[6], f[7]
    for i in range(p.size):
        g = grad[i] * grad_scale
        if l2 != _ZERO:
            g = g + p[i] * l2
        new_m = m[i] + (g - m[i]) * one_minus_beta1
        new_v = v[i] * beta2 + (g * g) * one_minus_beta2
        m[i] = new_m
        v[i] = new_v
        update = step_size * (new_m / (np.sqrt(new_v) + eps))
        if decay != _ZERO:
            update = update + p[i] * decay
        p[i] = p[i] - update


def adam(dtype, n, param, low, exp_avg, exp_avg_sq, grad, factors):
    p_scratch, g_scratch = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    f = floats(factors, 0, 8)
    for begin in range(0, n, BLOCK):
        count = at_most(n - begin, BLOCK)
        g = load_block(dtype, grad, begin, count, g_scratch)
        p = load_master(param, low, begin, count, p_scratch)
        adam_block(p, floats(exp_avg, begin, count), floats(exp_avg_sq, begin, count), g, f)
        store_master(p, param, low, begin, count)


# ---- Adam with bf16 moments, rounded stochastically ----------------------------------------------------------------


@inner
def mix(x):
    x = np.uint32((x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D))
    x = np.uint32((x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B))
    return np.uint32(x ^ (x >> np.uint32(16)))


@inner
def round_stochastically(value, random):
    rounded = np.uint32(bits(value) + np.uint32(random & np.uint32(0xFFFF))) >> np.uint32(16)
    return np.uint16(0x7FC0) if value != value else np.uint16(rounded)


@inner
def store_stochastically(key0, key1, first, m, v, exp_avg, exp_avg_sq):
    """Element i of the block has the index `first + i` in the whole."""
    first_low, first_high = np.uint32(first), np.uint32(first >> 32)
    for i in range(m.size):
        low = np.uint32(first_low + np.uint32(i))
        high = np.uint32(first_high + np.uint32(1)) if low < first_low else first_high
        random = mix(np.uint32(mix(np.uint32(low ^ key0)) ^ high ^ key1))
        exp_avg[i] = round_stochastically(m[i], random)
        exp_avg_sq[i] = round_stochastically(v[i], np.uint32(random >> np.uint32(16)))


def adam_bf16(dtype, n, param, low, exp_avg, exp_avg_sq, grad, factors, rounding):
    p_scratch, g_scratch = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    m_scratch, v_scratch = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    f = floats(factors, 0, 8)
    keys = carray(pointer(rounding), 2, np.uint32)
    first_index = carray(pointer(rounding), 2, np.int64)[1]
    for begin in range(0, n, BLOCK):
        count = at_most(n - begin, BLOCK)
        g = load_block(dtype, grad, begin, count, g_scratch)
        m = load_block(BF16, exp_avg, begin, count, m_scratch)
        v = load_block(BF16, exp_avg_sq, begin, count, v_scratch)
        p = load_master(param, low, begin, count, p_scratch)
        adam_block(p, m, v, g, f)
        m_out, v_out = halves(exp_avg, begin, count), halves(exp_avg_sq, begin, count)
        store_stochastically(keys[0], keys[1], first_index + begin, m, v, m_out, v_out)
        store_master(p, param, low, begin, count)


# ---- Adam with 8-bit moments --------------------------------------------------------------------------------------


@inner
def largest_magnitude(values):
    largest = np.uint32(0)
    for i in range(values.size):
        magnitude = np.uint32(bits(values[i]) & np.uint32(0x7FFFFFFF))
        largest = magnitude if magnitude > largest else largest
    return real(largest)


@inner
def round_to_int(value):
    return np.int32(bits(value + _ROUNDER) - np.uint32(0x4B400000))


@inner
def usable(scale):
    return np.int32(-1) if scale > _ZERO and scale < _INFINITY else np.int32(0)


@inner
def encode_signed(values, codes, scales, block):
    scale = largest_magnitude(values)
    scales[block] = scale
    keep = usable(scale)
    for i in range(values.size):
        pattern = bits(values[i])
        magnitude = real(pattern & np.uint32(0x7FFFFFFF))
        q = round_to_int(np.sqrt(magnitude / scale) * _127)
        q = np.int32(-q) if pattern >> np.uint32(31) else q
        codes[i] = np.int8(np.int32(q & keep))


@inner
def encode_positive(values, codes, scales, block):
    scale = largest_magnitude(values)
    scales[block] = scale
    keep = usable(scale)
    for i in range(values.size):
        q = round_to_int(np.sqrt(np.sqrt(values[i] / scale)) * _255)
        smallest = np.int32(1) if bits(values[i]) != np.uint32(0) else np.int32(0)
        q = q if q > smallest else smallest
        codes[i] = np.uint8(np.int32(q & keep))


@inner
def decode_signed(codes, scale, values):
    for i in range(codes.size):
        q = np.int32(codes[i])
        magnitude = np.int32(-q) if q < 0 else q
        values[i] = scale * (np.float32(np.int32(q * magnitude)) * _PER_127_SQUARED)


@inner
def decode_positive(codes, scale, values):
    for i in range(codes.size):
        q = np.int32(codes[i])
        root = np.float32(np.int32(q * q)) * _PER_255_SQUARED
        values[i] = scale * (root * root)


def adam_8bit(dtype, n, param, low, exp_avg, exp_avg_scale, exp_avg_sq, exp_avg_sq_scale, grad, factors):
    p_scratch, g_scratch = np.empty(QUANT_BLOCK, np.float32), np.empty(QUANT_BLOCK, np.float32)
    m_scratch, v_scratch = np.empty(QUANT_BLOCK, np.float32), np.empty(QUANT_BLOCK, np.float32)
    f = floats(factors, 0, 8)
    blocks = (n + QUANT_BLOCK - 1) // QUANT_BLOCK
    m_scales, v_scales = floats(exp_avg_scale, 0, blocks), floats(exp_avg_sq_scale, 0, blocks)
    for block in range(blocks):
        begin = block * QUANT_BLOCK
        count = at_most(n - begin, QUANT_BLOCK)
        m_codes = carray(pointer(exp_avg + begin), count, np.int8)
        v_codes = carray(pointer(exp_avg_sq + begin), count, np.uint8)
        m, v = m_scratch[:count], v_scratch[:count]
        decode_signed(m_codes, m_scales[block], m)
        decode_positive(v_codes, v_scales[block], v)
        g = load_block(dtype, grad, begin, count, g_scratch)
        p = load_master(param, low, begin, count, p_scratch)
        adam_block(p, m, v, g, f)
        encode_signed(m, m_codes, m_scales, block)
        encode_positive(v, v_codes, v_scales, block)
        store_master(p, param, low, begin, count)


# ---- SGD with momentum ----------------------------------------------------------------------------------------------


@inner
def sgd_block(p, grad, f):
    grad_scale, lr, l2 = f[0], f[1], f[4]
    for i in range(p.size):
        g = grad[i] * grad_scale
        if l2 != _ZERO:
            g = g + p[i] * l2
        p[i] = p[i] - g * lr


@inner
def momentum_block(p, buffer, grad, f, nesterov, first):
    grad_scale, lr, momentum, one_minus_dampening, l2 = f[0], f[1], f[2], f[3], f[4]
    for i in range(p.size):
        g = grad[i] * grad_scale
        if l2 != _ZERO:
            g = g + p[i] * l2
        b = g if first else buffer[i] * momentum + g * one_minus_dampening
        buffer[i] = b
        g = g + b * momentum if nesterov else b
        p[i] = p[i] - g * lr


def sgd(dtype, n, param, low, buffer, grad, factors):
    p_scratch, g_scratch = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    f = floats(factors, 0, 5)
    switches = carray(pointer(factors), 7, np.int32)
    nesterov, first = switches[5] != 0, switches[6] != 0
    for begin in range(0, n, BLOCK):
        count = at_most(n - begin, BLOCK)
        g = load_block(dtype, grad, begin, count, g_scratch)
        p = load_master(param, low, begin, count, p_scratch)
        if buffer == 0:
            sgd_block(p, g, f)
        else:
            momentum_block(p, floats(buffer, begin, count), g, f, nesterov, first)
        store_master(p, param, low, begin, count)


# ---- gradients ------------------------------------------------------------------------------------------------------


@inner
def block_dot(a, b, lane):
    """Dot product of 4096 elements: the products folded in half twelve times in float64, three folds at once first."""
    for j in range(SUM_LANES):
        p0 = np.float64(a[j]) * np.float64(b[j])
        p1 = np.float64(a[j + 512]) * np.float64(b[j + 512])
        p2 = np.float64(a[j + 1024]) * np.float64(b[j + 1024])
        p3 = np.float64(a[j + 1536]) * np.float64(b[j + 1536])
        p4 = np.float64(a[j + 2048]) * np.float64(b[j + 2048])
        p5 = np.float64(a[j + 2560]) * np.float64(b[j + 2560])
        p6 = np.float64(a[j + 3072]) * np.float64(b[j + 3072])
        p7 = np.float64(a[j + 3584]) * np.float64(b[j + 3584])
        lane[j] = ((p0 + p4) + (p2 + p6)) + ((p1 + p5) + (p3 + p7))
    half = SUM_LANES // 2
    while half > 0:
        lower, upper = lane[:half], lane[half : 2 * half]
        for j in range(half):
            lower[j] = lower[j] + upper[j]
        half //= 2
    return lane[0]


@inner
def whole_block(values, padded):
    """`values`, or where there are fewer than 4096 a copy with zeros behind it."""
    if values.size == SUM_BLOCK:
        return values
    count = values.size
    if values.ctypes.data != padded.ctypes.data:
        for i in range(count):
            padded[i] = values[i]
    for i in range(count, SUM_BLOCK):
        padded[i] = _ZERO
    return padded


@inner
def block_squares(dtype, source, begin, count, scratch, lane):
    values = whole_block(load_block(dtype, source, begin, count, scratch), scratch)
    return block_dot(values, values, lane)


@inner
def add_block(to, source_dtype, begin, count, target, source, t_scratch, s_scratch):
    s = load_block(source_dtype, source, begin, count, s_scratch)
    t = load_block(to, target, begin, count, t_scratch)
    for i in range(count):
        t[i] = t[i] + s[i]
    store_block(to, target, begin, count, t)


def squared_norm(dtype, n, source):
    scratch, lane = np.empty(SUM_BLOCK, np.float32), np.empty(SUM_LANES, np.float64)
    total = 0.0
    for begin in range(0, n, SUM_BLOCK):
        total += block_squares(dtype, source, begin, at_most(n - begin, SUM_BLOCK), scratch, lane)
    return total


def copy(to, source_dtype, n, target, source):
    scratch = np.empty(BLOCK, np.float32)
    for begin in range(0, n, BLOCK):
        count = at_most(n - begin, BLOCK)
        store_block(to, target, begin, count, load_block(source_dtype, source, begin, count, scratch))


def accumulate(to, source_dtype, n, target, source):
    t_scratch, s_scratch = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    for begin in range(0, n, BLOCK):
        add_block(to, source_dtype, begin, at_most(n - begin, BLOCK), target, source, t_scratch, s_scratch)


def copy_squared_norm(to, source_dtype, n, target, source):
    scratch, lane = np.empty(SUM_BLOCK, np.float32), np.empty(SUM_LANES, np.float64)
    total = 0.0
    for begin in range(0, n, SUM_BLOCK):
        count = at_most(n - begin, SUM_BLOCK)
        store_block(to, target, begin, count, load_block(source_dtype, source, begin, count, scratch))
        total += block_squares(to, target, begin, count, scratch, lane)
    return total


def accumulate_squared_norm(to, source_dtype, n, target, source):
    t_scratch, s_scratch = np.empty(SUM_BLOCK, np.float32), np.empty(SUM_BLOCK, np.float32)
    lane = np.empty(SUM_LANES, np.float64)
    total = 0.0
    for begin in range(0, n, SUM_BLOCK):
        count = at_most(n - begin, SUM_BLOCK)
        add_block(to, source_dtype, begin, count, target, source, t_scratch, s_scratch)
        total += block_squares(to, target, begin, count, t_scratch, lane)
    return total


def scale(dtype, n, target, factor):
    scratch = np.empty(BLOCK, np.float32)
    for begin in range(0, n, BLOCK):
        count = at_most(n - begin, BLOCK)
        values = load_block(dtype, target, begin, count, scratch)
        for i in range(count):
            values[i] = values[i] * factor
        store_block(dtype, target, begin, count, values)


def projection_sums(dtype, n, param, low, grad, sums):
    w_scratch, g_scratch = np.empty(SUM_BLOCK, np.float32), np.empty(SUM_BLOCK, np.float32)
    lane = np.empty(SUM_LANES, np.float64)
    weight_grad = weight_weight = grad_grad = 0.0
    for begin in range(0, n, SUM_BLOCK):
        count = at_most(n - begin, SUM_BLOCK)
        w = whole_block(load_master(param, low, begin, count, w_scratch), w_scratch)
        g = whole_block(load_block(dtype, grad, begin, count, g_scratch), g_scratch)
        weight_grad += block_dot(w, g, lane)
        weight_weight += block_dot(w, w, lane)
        grad_grad += block_dot(g, g, lane)
    out = carray(pointer(sums), 3, np.float64)
    out[0], out[1], out[2] = weight_grad, weight_weight, grad_grad


def project(dtype, n, param, low, grad, coefficient, rescale):
    w_scratch, g_scratch = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    for begin in range(0, n, BLOCK):
        count = at_most(n - begin, BLOCK)
        w = load_master(param, low, begin, count, w_scratch)
        g = load_block(dtype, grad, begin, count, g_scratch)
        for i in range(count):
            g[i] = (g[i] - w[i] * coefficient) * rescale
        store_block(dtype, grad, begin, count, g)
