"""Cutting flat tensors into cache-sized blocks, with scratch memory that is reused from block to block.

A block stays below 32768 elements on the CPU. From there on torch starts an OpenMP team for every operation, one team
per calling thread, and several executor threads would take each other's cores. Smaller blocks also stay in the cache
between the operations of one formula.

One pass over host memory runs at a time. Every operation of a block takes and gives back the interpreter's lock, which
two threads would hand to each other some thirty times per block: measured, two threads together were slower than one
and used 1.6 times its CPU time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

CPU_BLOCK = 28672  # elements; a multiple of every kernel's own block (4096, 256)
DEVICE_BLOCK = 1 << 22

P = ParamSpec("P")
R = TypeVar("R")

_local = threading.local()  # scratch is per thread: a thread may wait for its turn between two passes of one kernel
_turn = threading.Lock()


def one_pass(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a pass over flat tensors: no gradient graph, and no other pass beside it. Passes do not nest."""

    @wraps(function)
    def in_turn(*args: P.args, **kwargs: P.kwargs) -> R:
        with _turn, torch.no_grad():
            return function(*args, **kwargs)

    return in_turn


def block_size(device: torch.device) -> int:
    """Elements per block on `device`."""
    return CPU_BLOCK if device.type == "cpu" else DEVICE_BLOCK


def blocks(*tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """The corresponding blocks of tensors of equal length, in order: a Tensor for each Tensor, None for None."""
    first = next(tensor for tensor in tensors if tensor is not None)
    size = block_size(first.device)
    cut = [None if tensor is None else tensor.split(size) for tensor in tensors]
    for index in range(-(-first.numel() // size)):
        yield tuple(None if parts is None else parts[index] for parts in cut)


def scratch(role: str, like: Tensor, dtype: torch.dtype = torch.float32, numel: int | None = None) -> Tensor:
    """Scratch memory on the device of `like`, as long as it or of `numel` elements; its content is arbitrary.

    It belongs to the calling thread until the next call with the same role.
    """
    store: dict[Any, Tensor] = _local.__dict__
    key = (role, like.device, dtype)
    if key not in store:
        store[key] = torch.empty(block_size(like.device), dtype=dtype, device=like.device)
    whole = store[key]
    numel = like.numel() if numel is None else numel
    return whole if whole.numel() == numel else whole[:numel]
