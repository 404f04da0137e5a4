"""Adam with bf16 and with 8-bit moments in Triton: the formats and the bits of `offload.kernels.moments`."""

# mypy: disable-error-code="no-untyped-def"
# Parameters of device functions are Triton values, which have no static types.

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..factors import AdamFactors
from ..rounding import Rounding
from .formats import OPTIONS, as_float32, code, current_shape, launches, load_master, parts, store_master
from .optimizer import adam_arguments, adam_update

QUANT_BLOCK = 256
ROWS = 4  # blocks of 256 per program


@triton.jit
def mix(x):
    """The 32-bit hash of `offload.kernels.rounding`, on uint32."""
    x = (x ^ (x >> 16)) * tl.full((), 0x7FEB352D, tl.uint32)
    x = (x ^ (x >> 15)) * tl.full((), 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def round_stochastically(value, random):
    """int16 patterns of bf16: the high half of the pattern of `value` plus 16 random bits."""
    bits = (value.to(tl.uint32, bitcast=True) + random) >> 16
    return tl.where(value != value, tl.full((), 0x7FC0, tl.uint32), bits).to(tl.int16)


@triton.jit
def adam_bf16_kernel(
    param,
    low,
    exp_avg,
    exp_avg_sq,
    grad,
    n,
    key0,
    key1,
    first_index,
    grad_scale,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    step_size,
    decay,
    l2,
    IS_SPLIT: tl.constexpr,
    GRAD: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    HAS_L2: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    p = load_master(param, low, at, mask, IS_SPLIT)
    g = as_float32(tl.load(grad + at, mask=mask, other=0), GRAD) * grad_scale
    if HAS_L2:
        g = g + p * l2
    m = as_float32(tl.load(exp_avg + at, mask=mask, other=0), 1)
    v = as_float32(tl.load(exp_avg_sq + at, mask=mask, other=0), 1)
    p, m, v = adam_update(p, m, v, g, one_minus_beta1, beta2, one_minus_beta2, eps, step_size, decay, HAS_DECAY)
    index = at + first_index
    low_word = (index & 0xFFFFFFFF).to(tl.uint32)
    high_word = (index >> 32).to(tl.uint32)
    random = mix(mix(low_word ^ key0.to(tl.uint32)) ^ high_word ^ key1.to(tl.uint32))
    tl.store(exp_avg + at, round_stochastically(m, random & 0xFFFF), mask=mask)
    tl.store(exp_avg_sq + at, round_stochastically(v, random >> 16), mask=mask)
    store_master(param, low, at, mask, p, IS_SPLIT)


@triton.jit
def nearest_integer(value):
    """int32 nearest to 0 <= value < 2^22, ties to even: adding 1.5 * 2^23 leaves it in the low bits."""
    return (value + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def largest_magnitude(values):
    """[rows, 1] of [rows, 256]; taken over the patterns, where NaN lies above infinity."""
    largest = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    return largest[:, None].to(tl.float32, bitcast=True)


@triton.jit
def adam_8bit_kernel(
    param,
    low,
    exp_avg,
    exp_avg_scale,
    exp_avg_sq,
    exp_avg_sq_scale,
    grad,
    n,
    grad_scale,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    step_size,
    decay,
    l2,
    IS_SPLIT: tl.constexpr,
    GRAD: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    HAS_L2: tl.constexpr,
    ROWS: tl.constexpr,
    QUANT_BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    at = row * QUANT_BLOCK + tl.arange(0, QUANT_BLOCK)[None, :]
    mask, row_mask = at < n, row * QUANT_BLOCK < n
    p = load_master(param, low, at, mask, IS_SPLIT)
    g = as_float32(tl.load(grad + at, mask=mask, other=0), GRAD) * grad_scale
    if HAS_L2:
        g = g + p * l2
    m_code = tl.load(exp_avg + at, mask=mask, other=0).to(tl.int32)
    v_code = tl.load(exp_avg_sq + at, mask=mask, other=0).to(tl.int32)
    m_scale = tl.load(exp_avg_scale + row, mask=row_mask, other=0.0)
    v_scale = tl.load(exp_avg_sq_scale + row, mask=row_mask, other=0.0)
    root = (v_code * v_code).to(tl.float32) * (1.0 / 65025.0)
    m = m_scale * ((m_code * tl.abs(m_code)).to(tl.float32) * (1.0 / 16129.0))
    v = v_scale * (root * root)
    p, m, v = adam_update(p, m, v, g, one_minus_beta1, beta2, one_minus_beta2, eps, step_size, decay, HAS_DECAY)
    m, v = tl.where(mask, m, 0.0), tl.where(mask, v, 0.0)
    m_scale, v_scale = largest_magnitude(m), largest_magnitude(v)
    infinity = float("inf")
    m_root = tl.sqrt_rn(tl.div_rn(tl.abs(m), tl.broadcast_to(m_scale, (ROWS, QUANT_BLOCK))))
    v_root = tl.sqrt_rn(tl.sqrt_rn(tl.div_rn(v, tl.broadcast_to(v_scale, (ROWS, QUANT_BLOCK)))))
    m_code = nearest_integer(m_root * 127.0)
    m_code = tl.where(m.to(tl.int32, bitcast=True) < 0, -m_code, m_code)
    v_code = nearest_integer(v_root * 255.0)
    v_code = tl.where((v > 0.0) & (v_code < 1), 1, v_code)
    m_code = tl.where((m_scale > 0.0) & (m_scale < infinity), m_code, 0)
    v_code = tl.where((v_scale > 0.0) & (v_scale < infinity), v_code, 0)
    tl.store(exp_avg + at, m_code.to(tl.int8), mask=mask)
    tl.store(exp_avg_sq + at, v_code.to(tl.uint8), mask=mask)
    tl.store(exp_avg_scale + row, m_scale, mask=row_mask)
    tl.store(exp_avg_sq_scale + row, v_scale, mask=row_mask)
    store_master(param, low, at, mask, p, IS_SPLIT)


def adam_bf16_(
    param: Tensor,
    low: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    factors: AdamFactors,
    rounding: Rounding,
) -> None:
    keys = [key - (1 << 32) if key >> 31 else key for key in rounding.key_pair()]  # as int32
    shape = current_shape()
    for first, count, programs in launches(param.numel(), shape.block):
        tensors = parts(first, param, low, exp_avg, exp_avg_sq, grad)
        adam_bf16_kernel[(programs,)](
            *tensors,
            count,
            *keys,
            rounding.first_index + first,
            *adam_arguments(factors),
            IS_SPLIT=low is not None,
            GRAD=code(grad),
            HAS_DECAY=factors.decay != 0.0,
            HAS_L2=factors.l2 != 0.0,
            **shape.options,
        )


def adam_8bit_(
    param: Tensor,
    low: Tensor | None,
    exp_avg: Tensor,
    exp_avg_scale: Tensor,
    exp_avg_sq: Tensor,
    exp_avg_sq_scale: Tensor,
    grad: Tensor,
    factors: AdamFactors,
) -> None:
    n = param.numel()
    bulk = n - n % QUANT_BLOCK  # whole blocks; their accesses are wide because 256 divides their number
    for first, count in ((0, bulk), (bulk, n - bulk)):
        if count == 0:
            continue
        flat = parts(first, param, low, exp_avg, exp_avg_sq, grad)
        scales = [tensor[first // QUANT_BLOCK :] for tensor in (exp_avg_scale, exp_avg_sq_scale)]
        adam_8bit_kernel[(triton.cdiv(count, ROWS * QUANT_BLOCK),)](
            flat[0],
            flat[1],
            flat[2],
            scales[0],
            flat[3],
            scales[1],
            flat[4],
            count,
            *adam_arguments(factors),
            IS_SPLIT=low is not None,
            GRAD=code(grad),
            HAS_DECAY=factors.decay != 0.0,
            HAS_L2=factors.l2 != 0.0,
            ROWS=ROWS,
            QUANT_BLOCK=QUANT_BLOCK,
            **OPTIONS,
        )
