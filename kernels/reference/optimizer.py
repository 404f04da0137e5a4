"""Adam, AdamW and SGD in plain torch, in the order of operations that `offload.kernels.optimizer` states."""

from __future__ import annotations

import torch
from torch import Tensor

from ..factors import AdamFactors, SgdFactors
from .blocks import blocks, one_pass, scratch
from .master import load_master, store_master


@one_pass
def adam_(
    param: Tensor, low: Tensor | None, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, factors: AdamFactors
) -> None:
    for param_b, low_b, m, v, grad_b in blocks(param, low, exp_avg, exp_avg_sq, grad):
        p = load_master(param_b, low_b)
        adam_block(p, m, v, gradient(grad_b, p, factors.grad_scale, factors.l2), factors)
        store_master(p, param_b, low_b)


@one_pass
def sgd_(param: Tensor, low: Tensor | None, momentum_buffer: Tensor | None, grad: Tensor, factors: SgdFactors) -> None:
    for param_b, low_b, buffer_b, grad_b in blocks(param, low, momentum_buffer, grad):
        p = load_master(param_b, low_b)
        _sgd_block(p, buffer_b, gradient(grad_b, p, factors.grad_scale, factors.l2), factors)
        store_master(p, param_b, low_b)


def adam_block(p: Tensor, m: Tensor, v: Tensor, g: Tensor, f: AdamFactors) -> None:
    t = scratch("t", p)
    torch.sub(g, m, out=t)
    m.add_(t.mul_(f.one_minus_beta1))
    torch.mul(g, g, out=t)
    v.mul_(f.beta2).add_(t.mul_(f.one_minus_beta2))
    t.copy_(scratch("wide", p, torch.float64).copy_(v).sqrt_())  # see sqrt_
    torch.div(m, t.add_(f.eps), out=t)
    t.mul_(f.step_size)
    if f.decay != 0.0:
        s = scratch("s", p)
        t.add_(torch.mul(p, f.decay, out=s))
    p.sub_(t)


def sqrt_(values: Tensor) -> Tensor:
    """Take the correctly rounded float32 square root in place.

    It goes through float64: torch.sqrt on a CPU calls a vector library that is off by one unit in the last place for
    one number in 150. Rounding the float64 root gives the right float32 even so, because the root of a 24-bit number
    lies further from every rounding boundary than the error of the float64 root.
    """
    return values.copy_(values.to(torch.float64).sqrt_())


def _sgd_block(p: Tensor, b: Tensor | None, g: Tensor, f: SgdFactors) -> None:
    t = scratch("t", p)
    if b is not None:
        if f.first:
            b.copy_(g)
        else:
            b.mul_(f.momentum).add_(torch.mul(g, f.one_minus_dampening, out=t))
        g = torch.add(g, torch.mul(b, f.momentum, out=t), out=t) if f.nesterov else b
    p.sub_(torch.mul(g, f.lr, out=t))


def gradient(grad: Tensor, p: Tensor, scale: float, l2: float) -> Tensor:
    """The gradient in fp32, scaled, with the L2 term; `grad` itself is never written."""
    if grad.dtype == torch.float32 and scale == 1.0 and l2 == 0.0:
        return grad
    g = scratch("g", p)
    if grad.dtype == torch.float32:
        torch.mul(grad, scale, out=g)
    else:
        g.copy_(grad)
        if scale != 1.0:
            g.mul_(scale)
    return g if l2 == 0.0 else g.add_(torch.mul(p, l2, out=scratch("s", p)))
