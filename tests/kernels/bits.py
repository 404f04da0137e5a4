"""Helpers of the kernel tests: bitwise comparison, tensors that hold the hard bit patterns, all implementations."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from offload.kernels import dispatch
from offload.kernels.master import split_

HAS_NUMBA = importlib.util.find_spec("numba") is not None
COMPILED = ("native", "numba") if HAS_NUMBA else ("native",)
IMPLEMENTATIONS = (*COMPILED, "reference")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64, 1: torch.uint8}


def assert_same_bits(actual: Tensor | None, expected: Tensor | None, name: str = "tensor") -> None:
    """Equal bit for bit; NaN at the same places, whatever its payload."""
    assert (actual is None) == (expected is None), name
    if actual is None or expected is None:
        return
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, name
    if actual.is_floating_point():
        nan = torch.isnan(expected)
        assert torch.equal(torch.isnan(actual), nan), f"{name}: NaN at other places"
        actual, expected = actual.masked_fill(nan, 0.0), expected.masked_fill(nan, 0.0)
    integer = _INTEGERS[actual.element_size()]
    wrong = (actual.contiguous().view(integer) != expected.contiguous().view(integer)).nonzero()
    assert wrong.numel() == 0, (
        f"{name}: {wrong.shape[0]} of {actual.numel()} differ, first at {wrong[0].tolist()}: "
        f"{actual[tuple(wrong[0])].item()!r} != {expected[tuple(wrong[0])].item()!r}"
    )


def hard_float32() -> Tensor:
    """[2^16 * 5] fp32: every high half with the low halves where rounding turns, infinities and NaN included."""
    high = torch.arange(-(2**15), 2**15, dtype=torch.int32) * 65536
    lows = torch.tensor([0x0000, 0x0001, 0x7FFF, 0x8000, 0xFFFF], dtype=torch.int32)
    return (high[:, None] + lows).reshape(-1).view(torch.float32)


def any_values(n: int, dtype: torch.dtype, seed: int, *, finite: bool = False) -> Tensor:
    """[n] of `dtype`: half ordinary numbers, half uniformly drawn bit patterns (subnormal, huge, infinite, NaN)."""
    generator = torch.Generator().manual_seed(seed)
    ordinary = torch.randn(n, generator=generator).to(dtype)
    integer = _INTEGERS[dtype.itemsize]
    info = torch.iinfo(integer)
    patterns = torch.randint(info.min, info.max, (n,), generator=generator, dtype=integer).view(dtype)
    values = torch.where(torch.rand(n, generator=generator) < 0.5, ordinary, patterns)
    return values.nan_to_num(nan=0.0) if finite else values


def run_all(kernel: Callable[..., object], *tensors: Tensor | None) -> None:
    """Run `kernel` on copies of `tensors` with every implementation; every tensor must end with the same bits."""
    reference, expected = _run_on_copies("reference", kernel, tensors)
    for name in COMPILED:
        compiled, value = _run_on_copies(name, kernel, tensors)
        for index, (left, right) in enumerate(zip(compiled, reference, strict=True)):
            assert_same_bits(left, right, f"{name}, argument {index}")
        if isinstance(expected, float):
            values = [torch.tensor(each, dtype=torch.float64) for each in (value, expected)]
            assert_same_bits(*values, f"{name}, result")


def _run_on_copies(
    name: str, kernel: Callable[..., object], tensors: tuple[Tensor | None, ...]
) -> tuple[list[Tensor | None], object]:
    copies = [None if tensor is None else _copy_keeping_offset(tensor) for tensor in tensors]
    with dispatch.use(name):
        value = kernel(*copies)
    return copies, value


def _copy_keeping_offset(tensor: Tensor) -> Tensor:
    """A copy at the same offset from an aligned address, so that unaligned starts stay unaligned."""
    offset = tensor.storage_offset()
    whole = torch.empty(offset + tensor.numel(), dtype=tensor.dtype)
    part = whole[offset:]
    part.copy_(tensor)
    return part


def make_master(n: int, offset: int, is_split: bool, seed: int) -> tuple[Tensor, Tensor | None]:
    """(param, low) of `n` elements that start `offset` elements into their storage; low is None if not split."""
    whole = any_values(n + offset, torch.float32, seed)
    if not is_split:
        return whole[offset:], None
    param, low = torch.empty_like(whole, dtype=torch.bfloat16), torch.empty_like(whole, dtype=torch.int16)
    split_(whole, param, low)
    return param[offset:], low[offset:]
