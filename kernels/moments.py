"""Adam with smaller moments: bf16 with stochastic rounding, or 8 bits with one scale per block. Off by default.

Both change the numbers. The arithmetic of the update is that of `optimizer.adam_`, in float32; only how the moments
rest between two updates differs.

bf16: rounding to nearest would lose every change smaller than 1/512 of the moment, and with beta2 = 0.999 that is
most of them, so the rounding is stochastic and unbiased. 18 bytes per element with a split master and a 16-bit
gradient, against 26.

8 bits: blocks of 256 elements with one fp32 scale, the largest magnitude, and a companded code book:

    exp_avg    = scale * sign(q) * (q / 127)^2        q in -127 .. 127
    exp_avg_sq = scale * (q / 255)^4                  q in 0 .. 255, never 0 for a positive number

The powers put the codes where moments lie, many decades below the largest of the block: the smallest positive
exp_avg_sq is 2.4e-10 of it, and since the update divides by its root a 0 there would blow up. Decoding takes no table
and encoding one or two square roots, which round correctly everywhere, so all implementations agree to the bit.
After Dettmers et al., 8-bit optimizers via block-wise quantization, arXiv:2110.02861, whose tree-shaped code book the
accuracy test compares with. 14.06 bytes per element.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import FLOATS, check_dtype, check_flat, check_master
from .dispatch import backend
from .factors import AdamScalars, adam_factors
from .rounding import Rounding

QUANT_BLOCK = 256  # elements that share one scale

__all__ = ["QUANT_BLOCK", "Rounding", "adam_8bit_", "adam_bf16_", "num_scales"]


def num_scales(n: int) -> int:
    """How many scales `n` elements need: one for each block of 256, the last one may be short."""
    return -(-n // QUANT_BLOCK)


def adam_bf16_(
    param: Tensor,
    low: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    scalars: AdamScalars,
    rounding: Rounding,
    grad_scale: float = 1.0,
) -> None:
    """`optimizer.adam_` with bf16 moments that are rounded stochastically after the update.

    A moment keeps its high 16 bits after 16 random bits were added to its pattern: the low ones of the element's
    random number for exp_avg, the high ones for exp_avg_sq.

    Args:
        exp_avg, exp_avg_sq: [n] bf16.
        rounding: where the range lies; give each range of a unit its own `first_index`.
        others: as in `optimizer.adam_`.
    Raises: ValueError for other dtypes, lengths, layouts or devices.
    """
    n = _check(param, low, grad, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    check_dtype("exp_avg", exp_avg, torch.bfloat16)
    check_dtype("exp_avg_sq", exp_avg_sq, torch.bfloat16)
    if n:
        factors = adam_factors(scalars, grad_scale)
        backend(param.device).adam_bf16_(param, low, exp_avg, exp_avg_sq, grad, factors, rounding)


def adam_8bit_(
    param: Tensor,
    low: Tensor | None,
    exp_avg: Tensor,
    exp_avg_scale: Tensor,
    exp_avg_sq: Tensor,
    exp_avg_sq_scale: Tensor,
    grad: Tensor,
    scalars: AdamScalars,
    grad_scale: float = 1.0,
) -> None:
    """`optimizer.adam_` with moments that rest as 8-bit codes.

    Zeros in codes and scales are moments of zero. A block that meets an infinite or NaN moment reads as NaN from then
    on. To give the same bits however the work is cut, cut at multiples of 256 elements from the start of the buffer.

    Args:
        exp_avg: [n] int8 codes; exp_avg_sq: [n] uint8 codes.
        exp_avg_scale, exp_avg_sq_scale: [ceil(n / 256)] fp32.
        others: as in `optimizer.adam_`.
    Raises: ValueError for other dtypes, lengths, layouts or devices.
    """
    n = _check(param, low, grad, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    check_dtype("exp_avg", exp_avg, torch.int8)
    check_dtype("exp_avg_sq", exp_avg_sq, torch.uint8)
    scales = check_flat(exp_avg_scale=exp_avg_scale, exp_avg_sq_scale=exp_avg_sq_scale)
    check_dtype("exp_avg_scale", exp_avg_scale, torch.float32)
    check_dtype("exp_avg_sq_scale", exp_avg_sq_scale, torch.float32)
    if scales != num_scales(n):
        raise ValueError(f"{n} elements need {num_scales(n)} scales, one for each {QUANT_BLOCK}; got {scales}.")
    if n:
        factors = adam_factors(scalars, grad_scale)
        backend(param.device).adam_8bit_(
            param, low, exp_avg, exp_avg_scale, exp_avg_sq, exp_avg_sq_scale, grad, factors
        )


def _check(param: Tensor, low: Tensor | None, grad: Tensor, **moments: Tensor) -> int:
    n = check_flat(param=param, low=low, grad=grad, **moments)
    check_master(param, low)
    check_dtype("grad", grad, *FLOATS)
    return n
