"""Splitting and joining masters in Triton: 8 bytes per element, the bits of `offload.kernels.master`."""

# mypy: disable-error-code="no-untyped-def"
# Parameters of device functions are Triton values, which have no static types.

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .formats import current_shape, launches, load_master, parts, store_master


@triton.jit
def split_kernel(master, param, low, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    store_master(param, low, at, mask, tl.load(master + at, mask=mask, other=0.0), True)


@triton.jit
def join_kernel(master, param, low, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    tl.store(master + at, load_master(param, low, at, mask, True), mask=mask)


def split_(master: Tensor, param: Tensor, low: Tensor) -> None:
    shape = current_shape()
    for first, count, programs in launches(master.numel(), shape.block):
        split_kernel[(programs,)](*parts(first, master, param, low), count, **shape.options)


def join_(param: Tensor, low: Tensor, master: Tensor) -> None:
    shape = current_shape()
    for first, count, programs in launches(master.numel(), shape.block):
        join_kernel[(programs,)](*parts(first, master, param, low), count, **shape.options)
