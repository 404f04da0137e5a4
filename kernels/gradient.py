"""Passes over flat gradients: squared norm, accumulation, cast copies, scaling."""

from __future__ import annotations

from torch import Tensor

from .checks import FLOATS, check_dtype, check_flat
from .dispatch import backend
from .factors import float32

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


def copy_squared_norm_(dst: Tensor, src: Tensor) -> float:
    """`copy_`, and the `squared_norm` of what `dst` then holds, in one pass over the memory.

    Raises: ValueError for other dtypes, lengths, layouts or devices.
    """
    return backend(dst.device).copy_squared_norm_(dst, src) if _check_pair(dst=dst, src=src) else 0.0


def accumulate_squared_norm_(acc: Tensor, grad: Tensor) -> float:
    """`accumulate_`, and the `squared_norm` of what `acc` then holds, in one pass over the memory.

    Raises: ValueError for other dtypes, lengths, layouts or devices.
    """
    return backend(acc.device).accumulate_squared_norm_(acc, grad) if _check_pair(acc=acc, grad=grad) else 0.0


def scale_(flat: Tensor, factor: float) -> None:
    """flat = flat * factor: `factor` rounded to float32, multiplied in float32, rounded to the dtype of `flat`.

    Raises: ValueError for another dtype or layout.
    """
    n = check_flat(flat=flat)
    check_dtype("flat", flat, *FLOATS)
    if n:
        backend(flat.device).scale_(flat, float32(factor))


def _check_pair(**tensors: Tensor) -> int:
    n = check_flat(**tensors)
    for name, tensor in tensors.items():
        check_dtype(name, tensor, *FLOATS)
    return n
