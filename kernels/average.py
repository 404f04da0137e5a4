"""An exponential moving average of masters."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_dtype, check_flat, check_master
from .factors import SgdScalars
from .gradient import copy_
from .master import join_
from .optimizer import sgd_

BLOCK = 1 << 16  # elements of a split master that are joined at a time, so that they stay in the cache


def average_(average: Tensor, param: Tensor, low: Tensor | None, weight: float) -> None:
    """average = average - (average - master) * weight, each operation rounded on its own in float32.

    With weight 1 the master itself. It is `sgd_` with the average as its parameter: the bits are those of that kernel.

    Args:
        average: [n] fp32.
        param, low: [n] a master as in `optimizer.adam_`; only read.
        weight: of the master, 0 < weight <= 1, rounded to float32.
    Raises: ValueError for another weight, dtype, length, layout or device.
    """
    n = check_flat(average=average, param=param, low=low)
    check_dtype("average", average, torch.float32)
    check_master(param, low)
    if not 0.0 < weight <= 1.0:
        raise ValueError(f"weight is {weight}; the master's share of the average is in (0, 1].")
    if weight == 1.0:
        if low is None:
            copy_(average, param)
        else:
            join_(param, low, average)
        return
    towards = SgdScalars(lr=weight, momentum=0.0, dampening=0.0, weight_decay=1.0, nesterov=False, first=False)
    if low is None:
        sgd_(average, None, None, param, towards, -1.0)
        return
    block = torch.empty(min(n, BLOCK), dtype=torch.float32, device=average.device)
    for first in range(0, n, BLOCK):
        part = slice(first, min(first + BLOCK, n))
        master = block[: part.stop - first]
        join_(param[part], low[part], master)
        sgd_(average[part], None, None, master, towards, -1.0)
