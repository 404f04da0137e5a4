"""Letting a generator advance by what an initialisation draws, without the memory that the drawn numbers would take."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_CHUNK_NUMEL = 1 << 18
_GROUP = 16  # torch fills normal numbers in groups of 16, and makes the last 16 anew where the size is no multiple


def is_drawn_in_order(func: Callable[..., Any], tensor: Tensor) -> bool:
    """Whether `func` on `tensor` draws the same numbers when it is called on runs of elements one after the other."""
    in_order = (torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default)
    return func in in_order and tensor.is_contiguous() and tensor.is_floating_point()


def draw(func: Callable[..., Any], shape: Sequence[int], dtype: torch.dtype, args: Any, kwargs: Any) -> None:
    """Advance the generator as `func` on a contiguous tensor would, in chunks that stay in the cache."""
    left = math.prod(shape)
    scratch = torch.empty(min(left, _CHUNK_NUMEL + _GROUP), dtype=dtype)
    while left:
        numel = left if left <= len(scratch) else _CHUNK_NUMEL  # the last chunk has at least a group, and the rest
        func(scratch[:numel], *args, **kwargs)
        left -= numel
