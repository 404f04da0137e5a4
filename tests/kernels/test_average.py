"""The moving average has the bits of the formula in plain torch, for all three kinds of master."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from offload.kernels import dispatch
from offload.kernels.average import BLOCK, average_
from offload.kernels.master import split_

from .bits import assert_same_bits


def masters(n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, generator=generator), torch.randn(n, generator=generator)


@pytest.mark.parametrize("name", ["native", "reference"])
@pytest.mark.parametrize("is_split", [False, True])
@pytest.mark.parametrize("n", [0, 5, BLOCK + 77])
@pytest.mark.parametrize("weight", [1.0, 0.5, 1e-3])
def test_average(name: str, is_split: bool, n: int, weight: float) -> None:
    average, master = masters(n)
    expected = average - (average - master) * weight if weight < 1.0 else master.clone()
    param, low = master.clone(), None
    if is_split:
        param, low = torch.empty(n, dtype=torch.bfloat16), torch.empty(n, dtype=torch.int16)
        split_(master, param, low)
    before = param.clone(), None if low is None else low.clone()
    with dispatch.use(name):
        average_(average, param, low, weight)
    assert_same_bits(average, expected)
    assert_same_bits(param, before[0])
    assert_same_bits(low, before[1])


@pytest.mark.parametrize("weight", [0.0, -0.1, 1.5, float("nan")])
def test_weight_out_of_range(weight: float) -> None:
    with pytest.raises(ValueError, match=r"the master's share of the average is in \(0, 1\]"):
        average_(torch.zeros(3), torch.zeros(3), None, weight)
