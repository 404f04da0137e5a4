"""The split master: an fp32 number as its rounded bf16 high half, which the model computes with, and 16 low bits.

    high = (bits + 0x8000) >> 16        the parameter: the master rounded half up on the bit pattern
    low  = bits & 0xffff                read as a signed number
    bits = (high << 16) + low

Every pair decodes to one master and every master that is not NaN comes back exactly: rounding up made the high half
one larger exactly when low is negative. NaN becomes 0x7fc00000 first; else rounding could turn one into an infinity
or, past 0xffff8000, into a zero. Masters that lie within half a bf16 step of the largest give an infinite parameter,
as rounding to nearest does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_dtype, check_flat
from .dispatch import backend


def split_(master: Tensor, param: Tensor, low: Tensor) -> None:
    """Write the halves of `master` [n] fp32 into `param` [n] bf16 and `low` [n] int16. 8 bytes per element.

    Raises: ValueError for other dtypes, lengths, layouts or devices.
    """
    if _check(param, low, master):
        backend(master.device).split_(master, param, low)


def join_(param: Tensor, low: Tensor, master: Tensor) -> None:
    """Write into `master` [n] fp32 the number whose halves are `param` [n] bf16 and `low` [n] int16.

    Raises: ValueError for other dtypes, lengths, layouts or devices.
    """
    if _check(param, low, master):
        backend(master.device).join_(param, low, master)


def _check(param: Tensor, low: Tensor, master: Tensor) -> int:
    n = check_flat(master=master, param=param, low=low)
    check_dtype("master", master, torch.float32)
    check_dtype("param", param, torch.bfloat16)
    check_dtype("low", low, torch.int16)
    return n
