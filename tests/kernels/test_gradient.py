"""Gradient passes: a squared norm with a fixed order, accumulation and casts rounded once."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.kernels import dispatch
from offload.kernels.gradient import (
    accumulate_,
    accumulate_squared_norm_,
    copy_,
    copy_squared_norm_,
    scale_,
    squared_norm,
)
from offload.kernels.native import library

from .bits import COMPILED, DTYPES, IMPLEMENTATIONS, any_values, assert_same_bits, hard_float32, run_all

LENGTHS = st.one_of(st.integers(0, 300), st.sampled_from([4095, 4096, 4097, 16383, 16385, 40001]))
CASES = {"n": LENGTHS, "offset": st.integers(0, 17), "seed": st.integers(0, 1000)}


@settings(max_examples=60, deadline=None)
@given(dtype=st.sampled_from(DTYPES), finite=st.booleans(), **CASES)
def test_squared_norm_all_equal_reference(n: int, offset: int, seed: int, dtype: torch.dtype, finite: bool) -> None:
    run_all(squared_norm, any_values(n + offset, dtype, seed, finite=finite)[offset:])


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_squared_norm_is_the_stated_tree(name: str, dtype: torch.dtype) -> None:
    flat = torch.randn(3 * 4096 + 77, generator=torch.Generator().manual_seed(0)).to(dtype)
    total = 0.0
    for block in flat.double().split(4096):
        squares = [value * value for value in block.tolist()] + [0.0] * (4096 - block.numel())
        while len(squares) > 1:
            half = len(squares) // 2
            squares = [squares[i] + squares[i + half] for i in range(half)]
        total += squares[0]
    with dispatch.use(name):
        assert squared_norm(flat) == total
        assert squared_norm(flat[:0]) == 0.0


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_squared_norm_is_finite_exactly_when_every_element_is(name: str, dtype: torch.dtype) -> None:
    with dispatch.use(name):
        flat = torch.full((9001,), torch.finfo(dtype).max, dtype=dtype)
        assert squared_norm(flat) == pytest.approx(9001 * torch.finfo(dtype).max ** 2)
        for bad, place in ((math.inf, 0), (-math.inf, 4096), (math.nan, 9000)):
            flat.zero_()[place] = bad
            assert not math.isfinite(squared_norm(flat))


@settings(max_examples=60, deadline=None)
@given(dst=st.sampled_from(DTYPES), src=st.sampled_from(DTYPES), **CASES)
def test_copy_and_accumulate_all_equal_reference(
    n: int, offset: int, seed: int, dst: torch.dtype, src: torch.dtype
) -> None:
    target = any_values(n + offset, dst, seed)[offset:]
    source = any_values(n + offset, src, seed + 1)[offset:]
    for kernel in (copy_, accumulate_, copy_squared_norm_, accumulate_squared_norm_):
        run_all(kernel, target, source)
    run_all(lambda flat: scale_(flat, 1.0 / 3.0), target)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dst", DTYPES)
def test_norm_made_on_the_way_is_that_of_what_was_stored(name: str, dst: torch.dtype) -> None:
    target, source = torch.randn(9001).to(dst), torch.randn(9001)
    with dispatch.use(name):
        assert accumulate_squared_norm_(target, source) == squared_norm(target)
        assert copy_squared_norm_(target, source) == squared_norm(target) == squared_norm(source.to(dst))


@pytest.mark.parametrize("isa", library.ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_casts_equal_torch_on_the_hard_patterns(isa: str, dtype: torch.dtype) -> None:
    with library.limit_isa(isa):
        for name in COMPILED:
            check_casts(name, dtype)


def check_casts(name: str, dtype: torch.dtype) -> None:
    source = hard_float32()
    with dispatch.use(name):
        narrow = torch.empty_like(source, dtype=dtype)
        copy_(narrow, source)
        assert_same_bits(narrow, source.to(dtype))
        wide = torch.empty_like(source)
        copy_(wide, narrow)
        assert_same_bits(wide, narrow.float())


@pytest.mark.slow
@pytest.mark.timeout(1800)  # 2^32 numbers
@pytest.mark.parametrize("name", COMPILED)
def test_cast_to_half_equals_torch_on_all_patterns(name: str) -> None:
    chunk = 1 << 18
    narrow = torch.empty(chunk, dtype=torch.float16)
    with dispatch.use(name):
        for start in range(-(2**31), 2**31, chunk):
            source = torch.arange(start, start + chunk, dtype=torch.int64).to(torch.int32).view(torch.float32)
            copy_(narrow, source)
            assert_same_bits(narrow, source.half())


def test_accumulation_is_rounded_once() -> None:
    """1 + 2^-9 needs more bits than bf16 has: the sum is made in float32 and rounded to nearest even at the end."""
    acc, grad = torch.ones(8, dtype=torch.bfloat16), torch.full((8,), 2.0**-9 + 2.0**-20)
    accumulate_(acc, grad)
    assert torch.equal(acc, (torch.ones(8) + grad).to(torch.bfloat16))
    assert torch.equal(acc, torch.ones(8, dtype=torch.bfloat16))
