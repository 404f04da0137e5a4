"""The split master loses nothing: every fp32 pattern that is not NaN comes back, NaN comes back canonical."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from offload.kernels import dispatch
from offload.kernels.master import join_, split_

from .bits import IMPLEMENTATIONS, any_values, hard_float32, run_all

CANONICAL_NAN = 0x7FC00000


def round_trip(master: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    param, low = torch.empty_like(master, dtype=torch.bfloat16), torch.empty_like(master, dtype=torch.int16)
    back = torch.empty_like(master)
    split_(master, param, low)
    join_(param, low, back)
    return param, low, back


def check_round_trip(master: Tensor) -> None:
    param, _, back = round_trip(master)
    bits, nan = master.view(torch.int32), torch.isnan(master)
    assert torch.equal(back.view(torch.int32), torch.where(nan, CANONICAL_NAN, bits))
    assert torch.equal(torch.isnan(param), nan)
    wide = bits.to(torch.int64)
    half_up = ((wide + 0x8000) >> 16).to(torch.int16)  # rounding half up, on the pattern
    assert torch.equal(param.view(torch.int16)[~nan], half_up[~nan])


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_hard_patterns_round_trip(name: str) -> None:
    with dispatch.use(name):
        check_round_trip(hard_float32())


@pytest.mark.slow
@pytest.mark.timeout(1800)  # 2^32 numbers
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_all_patterns_round_trip(name: str) -> None:
    chunk = 1 << 18
    with dispatch.use(name):
        for start in range(-(2**31), 2**31, chunk):
            check_round_trip(torch.arange(start, start + chunk, dtype=torch.int64).to(torch.int32).view(torch.float32))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_every_pair_decodes_to_one_master(name: str) -> None:
    """join_ is one to one: splitting what it gives returns the pair it was given, wherever that is not NaN."""
    high = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    with dispatch.use(name):
        for value in (-(2**15), -1, 0, 1, 2**15 - 1):
            low = torch.full_like(high, value, dtype=torch.int16)
            master, param, again = torch.empty_like(high, dtype=torch.float32), torch.empty_like(high), low.clone()
            join_(high, low, master)
            split_(master, param, again)
            good = ~torch.isnan(master)
            assert torch.equal(param.view(torch.int16)[good], high.view(torch.int16)[good])
            assert torch.equal(again[good], low[good])


@settings(max_examples=50, deadline=None)
@given(n=st.integers(0, 40_000), offset=st.integers(0, 9), seed=st.integers(0, 1000))
def test_all_equal_reference(n: int, offset: int, seed: int) -> None:
    master = any_values(n + offset, torch.float32, seed)[offset:]
    param = torch.empty(n + offset, dtype=torch.bfloat16)[offset:]
    low = torch.empty(n + offset, dtype=torch.int16)[offset:]
    run_all(split_, master, param.zero_(), low.zero_())
    split_(master, param, low)
    run_all(join_, param, low, torch.zeros(n))
