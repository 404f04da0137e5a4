"""perpGrad: the gradient loses its component along the weights and keeps its length."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.kernels import dispatch
from offload.kernels.gradient import squared_norm
from offload.kernels.master import join_
from offload.kernels.projection import ProjectionSums, project_, projection_sums

from .bits import DTYPES, IMPLEMENTATIONS, any_values, make_master, run_all


@settings(max_examples=60, deadline=None)
@given(
    n=st.one_of(st.integers(0, 300), st.sampled_from([4096, 4097, 30_001])),
    offset=st.integers(0, 9),
    is_split=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_all_equal_reference(n: int, offset: int, is_split: bool, dtype: torch.dtype, seed: int) -> None:
    param, low = make_master(n, offset, is_split, seed)
    grad = any_values(n + offset, dtype, seed + 1)[offset:]
    run_all(lambda p, w, g: project_(p, w, g, 0.3, 1.1), param, low, grad)
    for part in ("weight_grad", "weight_weight", "grad_grad"):
        run_all(lambda p, w, g, part=part: getattr(projection_sums(p, w, g), part), param, low, grad)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("is_split", [False, True])
def test_gradient_becomes_perpendicular_and_keeps_its_length(name: str, is_split: bool) -> None:
    torch.manual_seed(0)
    n = 10_007
    weight = torch.randn(n) * 0.02
    grad = torch.randn(n) * 0.01 + weight
    param, low = weight, None
    if is_split:
        from offload.kernels.master import split_

        param, low = torch.empty(n, dtype=torch.bfloat16), torch.empty(n, dtype=torch.int16)
        split_(weight, param, low)
    before = squared_norm(grad)
    with dispatch.use(name):
        project_(param, low, grad, *projection_sums(param, low, grad).factors())
    w, g = weight.double(), grad.double()
    assert abs(torch.dot(w, g)) / (w.norm() * g.norm()) < 1e-6
    assert squared_norm(grad) == pytest.approx(before, rel=1e-5)
    if low is not None:
        master = torch.empty(n)
        join_(param, low, master)
        assert torch.equal(master, weight)


def test_sums_of_chunks_make_the_sums_of_the_tensor() -> None:
    weight, grad = torch.randn(50_000), torch.randn(50_000)
    whole = projection_sums(weight, None, grad)
    parts = [projection_sums(weight[i : i + 8192], None, grad[i : i + 8192]) for i in range(0, 50_000, 8192)]
    added = parts[0]
    for part in parts[1:]:
        added = added + part
    assert added.weight_grad == pytest.approx(whole.weight_grad, rel=1e-12)
    assert added.weight_weight == pytest.approx(torch.dot(weight.double(), weight.double()).item(), rel=1e-12)
    assert added.grad_grad == pytest.approx(whole.grad_grad, rel=1e-12)


def test_one_element_and_zero_weights_give_no_nan() -> None:
    grad = torch.tensor([0.7])
    project_(torch.tensor([0.3]), None, grad, *projection_sums(torch.tensor([0.3]), None, grad).factors())
    assert grad.item() == 0.0
    assert ProjectionSums(weight_grad=0.0, weight_weight=0.0, grad_grad=1.0).factors() == (0.0, 1.0)
    assert ProjectionSums(weight_grad=math.nan, weight_weight=1.0, grad_grad=math.inf).factors() == (0.0, 1.0)
    assert ProjectionSums(weight_grad=0.0, weight_weight=1.0, grad_grad=0.0).factors() == (0.0, 0.0)
