"""Adam, AdamW and SGD in Triton: one pass, the formulas and the bits of `offload.kernels.optimizer`.

Bytes per element as on the CPU: AdamW 26 (split master, 16-bit gradient) or 28 (fp32), SGD with momentum 18.
"""

# mypy: disable-error-code="no-untyped-def"
# Parameters of device functions are Triton values, which have no static types.

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..factors import AdamFactors, SgdFactors
from .formats import as_float32, code, current_shape, launches, load_master, parts, store_master


@triton.jit
def adam_update(p, m, v, g, one_minus_beta1, beta2, one_minus_beta2, eps, step_size, decay, HAS_DECAY: tl.constexpr):
    """New (p, m, v) from the old ones and the scaled gradient; every operation rounds on its own."""
    m = m + (g - m) * one_minus_beta1
    v = v * beta2 + (g * g) * one_minus_beta2
    update = step_size * tl.div_rn(m, tl.sqrt_rn(v) + eps)
    if HAS_DECAY:
        update = update + p * decay
    return p - update, m, v


@triton.jit
def adam_kernel(
    param,
    low,
    exp_avg,
    exp_avg_sq,
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
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    p = load_master(param, low, at, mask, IS_SPLIT)
    g = as_float32(tl.load(grad + at, mask=mask, other=0), GRAD) * grad_scale
    if HAS_L2:
        g = g + p * l2
    m = tl.load(exp_avg + at, mask=mask, other=0.0)
    v = tl.load(exp_avg_sq + at, mask=mask, other=0.0)
    p, m, v = adam_update(p, m, v, g, one_minus_beta1, beta2, one_minus_beta2, eps, step_size, decay, HAS_DECAY)
    tl.store(exp_avg + at, m, mask=mask)
    tl.store(exp_avg_sq + at, v, mask=mask)
    store_master(param, low, at, mask, p, IS_SPLIT)


@triton.jit
def sgd_kernel(
    param,
    low,
    buffer,
    grad,
    n,
    grad_scale,
    lr,
    momentum,
    one_minus_dampening,
    l2,
    IS_SPLIT: tl.constexpr,
    GRAD: tl.constexpr,
    HAS_BUFFER: tl.constexpr,
    HAS_L2: tl.constexpr,
    NESTEROV: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    p = load_master(param, low, at, mask, IS_SPLIT)
    g = as_float32(tl.load(grad + at, mask=mask, other=0), GRAD) * grad_scale
    if HAS_L2:
        g = g + p * l2
    if HAS_BUFFER:
        if FIRST:
            b = g
        else:
            b = tl.load(buffer + at, mask=mask, other=0.0) * momentum + g * one_minus_dampening
        tl.store(buffer + at, b, mask=mask)
        if NESTEROV:
            g = g + b * momentum
        else:
            g = b
    store_master(param, low, at, mask, p - g * lr, IS_SPLIT)


def adam_(
    param: Tensor, low: Tensor | None, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, factors: AdamFactors
) -> None:
    shape = current_shape()
    for first, count, programs in launches(param.numel(), shape.block):
        tensors = parts(first, param, low, exp_avg, exp_avg_sq, grad)
        adam_kernel[(programs,)](
            *tensors,
            count,
            *adam_arguments(factors),
            IS_SPLIT=low is not None,
            GRAD=code(grad),
            HAS_DECAY=factors.decay != 0.0,
            HAS_L2=factors.l2 != 0.0,
            **shape.options,
        )


def sgd_(param: Tensor, low: Tensor | None, momentum_buffer: Tensor | None, grad: Tensor, factors: SgdFactors) -> None:
    shape = current_shape()
    for first, count, programs in launches(param.numel(), shape.block):
        tensors = parts(first, param, low, momentum_buffer, grad)
        sgd_kernel[(programs,)](
            *tensors,
            count,
            factors.grad_scale,
            factors.lr,
            factors.momentum,
            factors.one_minus_dampening,
            factors.l2,
            IS_SPLIT=low is not None,
            GRAD=code(grad),
            HAS_BUFFER=momentum_buffer is not None,
            HAS_L2=factors.l2 != 0.0,
            NESTEROV=factors.nesterov,
            FIRST=factors.first,
            **shape.options,
        )


def adam_arguments(factors: AdamFactors) -> tuple[float, ...]:
    """The factors in the order of the kernels' parameters."""
    return (
        factors.grad_scale,
        factors.one_minus_beta1,
        factors.beta2,
        factors.one_minus_beta2,
        factors.eps,
        factors.step_size,
        factors.decay,
        factors.l2,
    )
