"""Fused optimizer updates on flat buffers, one pass over the data.

Adam, AdamW: Kingma and Ba, arXiv:1412.6980; Loshchilov and Hutter, arXiv:1711.05101. Momentum: as torch.optim.SGD.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import FLOATS, check_dtype, check_flat, check_master
from .dispatch import backend
from .factors import AdamScalars, SgdScalars, adam_factors, sgd_factors

__all__ = ["AdamScalars", "SgdScalars", "adam_", "sgd_"]


def adam_(
    param: Tensor,
    low: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    scalars: AdamScalars,
    grad_scale: float = 1.0,
) -> None:
    """One Adam or AdamW update of a range, in place; blocks until done on a CPU, enqueues on a GPU.

    In float32, every operation rounded on its own, in this order (factors: float64 on the host, rounded once):

        g = float32(grad) * (-grad_scale if maximize else grad_scale)
        g = g + p * weight_decay                                        only if not decoupled and weight_decay != 0
        m = m + (g - m) * (1 - beta1)
        v = v * beta2 + (g * g) * (1 - beta2)
        u = (lr * c / (1 - beta1^step)) * (m / (sqrt(v) + eps * c))      c = sqrt(1 - beta2^step)
        u = u + p * (lr * weight_decay)                                 only if decoupled and weight_decay != 0
        p = p - u

    This is the order of section 2 of arXiv:1412.6980, where the second bias correction moves out of the root's way.
    The decay is added to the small update and not multiplied into the parameter, which saves one rounding at the
    parameter's magnitude. All implementations agree to the bit, except for the payload of a NaN in fp32 buffers.

    Bytes per element: 26 with a split master and a 16-bit gradient (2+2+4+4+2 read, 2+2+4+4 written),
    28 with an fp32 master and gradient. Any sub-range may be updated alone; nothing but the scalars is shared.

    Args:
        param: [n] fp32 (then `low` is None and it is its own master) or bf16 (the high half of a split master).
        low: [n] int16, low half of the master, or None. NaN is made canonical before it is split.
        exp_avg, exp_avg_sq: [n] fp32.
        grad: [n] fp32, bf16 or fp16; only read. No two arguments may overlap.
        grad_scale: multiplies the gradient first, as float32 (unscale times clip factor).
    Raises: ValueError for other dtypes, lengths, layouts or devices.
    """
    n = check_flat(param=param, low=low, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, grad=grad)
    check_master(param, low)
    check_dtype("exp_avg", exp_avg, torch.float32)
    check_dtype("exp_avg_sq", exp_avg_sq, torch.float32)
    check_dtype("grad", grad, *FLOATS)
    if n:
        backend(param.device).adam_(param, low, exp_avg, exp_avg_sq, grad, adam_factors(scalars, grad_scale))


def sgd_(
    param: Tensor,
    low: Tensor | None,
    momentum_buffer: Tensor | None,
    grad: Tensor,
    scalars: SgdScalars,
    grad_scale: float = 1.0,
) -> None:
    """One SGD update of a range, in place; blocks until done on a CPU, enqueues on a GPU.

    In float32, every operation rounded on its own, in this order:

        g = float32(grad) * (-grad_scale if maximize else grad_scale)
        g = g + p * weight_decay                                        only if weight_decay != 0
        b = g if first else b * momentum + g * (1 - dampening)          only with a momentum buffer
        g = g + b * momentum if nesterov else b                         only with a momentum buffer
        p = p - g * lr

    Bytes per element: 18 with a split master, a momentum buffer and a 16-bit gradient; 10 without the buffer.

    Args:
        param, low, grad, grad_scale: as in `adam_`.
        momentum_buffer: [n] fp32; None exactly when momentum is 0. Its content is not read when `scalars.first`.
    Raises: ValueError for other dtypes, lengths, layouts or devices, or a missing momentum buffer.
    """
    n = check_flat(param=param, low=low, momentum_buffer=momentum_buffer, grad=grad)
    check_master(param, low)
    check_dtype("grad", grad, *FLOATS)
    if momentum_buffer is not None:
        check_dtype("momentum_buffer", momentum_buffer, torch.float32)
    if (momentum_buffer is None) != (scalars.momentum == 0.0):
        raise ValueError(
            f"momentum is {scalars.momentum}, momentum_buffer is {'absent' if momentum_buffer is None else 'given'}; "
            "pass a buffer exactly when momentum is not 0."
        )
    if n:
        backend(param.device).sgd_(param, low, momentum_buffer, grad, sgd_factors(scalars, grad_scale))
