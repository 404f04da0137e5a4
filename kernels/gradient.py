"""Passes over flat gradients: squared norm, accumulation, cast copies."""

from __future__ import annotations

from torch import Tensor

from .checks import FLOATS, check_dtype, check_flat
from .dispatch import backend

NORM_BLOCK = 4096  # elements that are summed in one tree


def squared_norm(flat: Tensor) -> float:
    """Sum of the squares of `flat` [n] fp32, bf16 or fp16, in float64 and in one fixed order; 0.0 when empty.

    The order: blocks of 4096 elements counted from the start of `flat`, the last one padded with zeros; a block is
    folded in half twelve times (s[i] += s[i + half] for half = 2048, 1024, ..., 1); the blocks' sums are added in
    order. The square of a float is exact in float64 and the sum cannot overflow, so the result is infinite or NaN
    exactly when some element is: it serves as the non-finite flag too. Waits for the device.

    Raises: ValueError for another dtype or layout.
    """
    n = check_flat(flat=flat)
    check_dtype("flat", flat, *FLOATS)
    return backend(flat.device).squared_norm(flat) if n else 0.0


def accumulate_(acc: Tensor, grad: Tensor) -> None:
    """acc += grad: added in float32, rounded once (to nearest even) to the dtype of `acc`.

    Args:
        acc, grad: [n], each fp32, bf16 or fp16; they may not overlap.
    Raises: ValueError for other dtypes, lengths, layouts or devices.
    """
    if _check_pair(acc=acc, grad=grad):
        backend(acc.device).accumulate_(acc, grad)


def copy_(dst: Tensor, src: Tensor) -> None:
    """dst = src, cast to the dtype of `dst` with round to nearest even.

    Args:
        dst, src: [n], each fp32, bf16 or fp16; they may not overlap.
    Raises: ValueError for other dtypes, lengths, layouts or devices.
    """
    if _check_pair(dst=dst, src=src):
        backend(dst.device).copy_(dst, src)


def _check_pair(**tensors: Tensor) -> int:
    n = check_flat(**tensors)
    for name, tensor in tensors.items():
        check_dtype(name, tensor, *FLOATS)
    return n
