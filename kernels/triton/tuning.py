"""Choose how element-wise kernels are cut into programs, by measuring the AdamW kernel on one device.

Never part of a step: until `tune` is called everything runs with the first shape, and since every shape gives the same
bits, when it is called cannot change a result.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from ..factors import AdamScalars, adam_factors
from .formats import SHAPES, Shape, current_shape, set_shape
from .optimizer import adam_

REPETITIONS = 5
NUMEL = 1 << 26  # 1.7 GB of arrays, several times what a device caches


def tune(device: torch.device, numel: int = NUMEL, clock: Callable[[torch.device], float] | None = None) -> Shape:
    """Time every shape on scratch arrays of `numel` elements (26 B each), use the fastest from now on and return it.

    Args:
        clock: waits for the device and gives the time in seconds.
    Raises: torch.OutOfMemoryError if the arrays do not fit; the shape is then as before.
    """
    before = current_shape()
    try:
        arrays = _arrays(numel, device)
        times = {shape: _seconds(shape, arrays, device, clock or _synchronized) for shape in SHAPES}
    except BaseException:
        set_shape(before)
        raise
    best = min(times, key=lambda shape: times[shape])
    set_shape(best)
    return best


def _seconds(shape: Shape, arrays: tuple[Tensor, ...], device: torch.device, clock: Callable[..., float]) -> float:
    """Of the fastest of several AdamW passes; the first one, which compiles, does not count."""
    set_shape(shape)
    scalars = AdamScalars(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, step=1, decoupled=True)
    factors = adam_factors(scalars, 1.0)
    param, low, exp_avg, exp_avg_sq, grad = arrays
    adam_(param, low, exp_avg, exp_avg_sq, grad, factors)
    best = float("inf")
    for _ in range(REPETITIONS):
        begin_s = clock(device)
        adam_(param, low, exp_avg, exp_avg_sq, grad, factors)
        best = min(best, clock(device) - begin_s)
    return best


def _arrays(numel: int, device: torch.device) -> tuple[Tensor, ...]:
    """param, low, exp_avg, exp_avg_sq, grad of a split master."""
    types = (torch.bfloat16, torch.int16, torch.float32, torch.float32, torch.bfloat16)
    return tuple(torch.zeros(numel, dtype=dtype, device=device) for dtype in types)


def _synchronized(device: torch.device) -> float:
    torch.cuda.synchronize(device)
    return time.perf_counter()
