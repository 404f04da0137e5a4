"""All implementations give an update the same bits, whatever the length, alignment, dtype, values or scalars."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.kernels import dispatch, optimizer
from offload.kernels.native import library
from offload.kernels.optimizer import AdamScalars, SgdScalars

from .bits import DTYPES, IMPLEMENTATIONS, any_values, assert_same_bits, make_master, run_all

LENGTHS = st.one_of(st.integers(0, 300), st.sampled_from([4095, 4096, 4097, 16383, 16384, 16385, 40001]))
RATES = st.sampled_from([0.0, 1e-45, 1e-30, 1e-8, 1e-3, 1.0, 1e10, 1e38])
SCALES = st.sampled_from([1.0, 0.37, 2.0**-16, 65536.0, 1e-40, 0.0])


@settings(max_examples=80, deadline=None)
@given(
    n=LENGTHS,
    offset=st.integers(0, 17),
    is_split=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
    grad_scale=SCALES,
    scalars=st.builds(
        AdamScalars,
        lr=RATES,
        beta1=st.sampled_from([0.0, 0.9, 0.999]),
        beta2=st.sampled_from([0.0, 0.95, 0.999]),
        eps=st.sampled_from([0.0, 1e-25, 1e-8, 1.0]),
        weight_decay=st.sampled_from([0.0, 0.1, 1e3]),
        step=st.sampled_from([1, 2, 1000, 10**9]),
        decoupled=st.booleans(),
        maximize=st.booleans(),
    ),
)
def test_adam_all_equal_reference(
    n: int, offset: int, is_split: bool, dtype: torch.dtype, seed: int, grad_scale: float, scalars: AdamScalars
) -> None:
    param, low = make_master(n, offset, is_split, seed)
    moments = [any_values(n + offset, torch.float32, seed + k)[offset:] for k in (1, 2)]
    moments[1] = moments[1].abs() if seed % 4 else moments[1]
    grad = any_values(n + offset, dtype, seed + 3)[offset:]
    run_all(lambda *tensors: optimizer.adam_(*tensors, scalars, grad_scale), param, low, *moments, grad)


@settings(max_examples=80, deadline=None)
@given(
    n=LENGTHS,
    offset=st.integers(0, 17),
    is_split=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
    grad_scale=SCALES,
    lr=RATES,
    momentum=st.sampled_from([0.0, 0.5, 0.9]),
    weight_decay=st.sampled_from([0.0, 0.1]),
    kind=st.sampled_from(["plain", "dampened", "nesterov"]),
    first=st.booleans(),
    maximize=st.booleans(),
)
def test_sgd_all_equal_reference(
    n: int,
    offset: int,
    is_split: bool,
    dtype: torch.dtype,
    seed: int,
    grad_scale: float,
    lr: float,
    momentum: float,
    weight_decay: float,
    kind: str,
    first: bool,
    maximize: bool,
) -> None:
    scalars = SgdScalars(
        lr=lr,
        momentum=momentum,
        dampening=0.3 if kind == "dampened" else 0.0,
        weight_decay=weight_decay,
        nesterov=kind == "nesterov" and momentum > 0,
        first=first,
        maximize=maximize,
    )
    param, low = make_master(n, offset, is_split, seed)
    buffer = any_values(n + offset, torch.float32, seed + 1)[offset:] if momentum else None
    grad = any_values(n + offset, dtype, seed + 3)[offset:]
    run_all(lambda *tensors: optimizer.sgd_(*tensors, scalars, grad_scale), param, low, buffer, grad)


@pytest.mark.parametrize("isa", library.ISAS)
def test_every_instruction_set_gives_the_bits_of_the_reference(isa: str) -> None:
    scalars = AdamScalars(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, step=3, decoupled=True)
    for is_split, dtype in itertools.product((False, True), DTYPES):
        param, low = make_master(5001, 1, is_split, 7)
        moments = [any_values(5001, torch.float32, 8), any_values(5001, torch.float32, 9).abs()]
        grad = any_values(5001, dtype, 10)
        with library.limit_isa(isa):
            run_all(lambda *tensors: optimizer.adam_(*tensors, scalars, 0.5), param, low, *moments, grad)


def test_bits_do_not_depend_on_how_a_range_is_cut() -> None:
    """Several parameter groups inside one unit and any chunking by executor threads: only the elements matter."""
    n = 50_003
    groups = [(0, 17, 1e-3), (17, 20_001, 1e-2), (20_001, n, 0.0)]
    param, low = make_master(n, 0, True, 3)
    moments = [any_values(n, torch.float32, 4), any_values(n, torch.float32, 5).abs()]
    grad = any_values(n, torch.bfloat16, 6)
    results = []
    for name, chunk in (("native", n), *zip(IMPLEMENTATIONS, (1_111, 2_222, 7_777), strict=False)):
        tensors = [tensor.clone() for tensor in (param, low, *moments)]
        with dispatch.use(name):
            for start, stop, lr in groups:
                scalars = AdamScalars(lr=lr, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, step=2, decoupled=True)
                for begin in range(start, stop, chunk):
                    part = slice(begin, min(begin + chunk, stop))
                    optimizer.adam_(*(tensor[part] for tensor in tensors), grad[part], scalars)
        results.append(tensors)
    for other in results[1:]:
        for left, right in zip(results[0], other, strict=True):
            assert_same_bits(left, right)


def test_gradient_is_only_read() -> None:
    scalars = AdamScalars(lr=1e-3, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, step=1, decoupled=False)
    for name, dtype in itertools.product(IMPLEMENTATIONS, DTYPES):
        grad = torch.randn(100).to(dtype)
        before = grad.clone()
        with dispatch.use(name):
            optimizer.adam_(torch.randn(100), None, torch.zeros(100), torch.zeros(100), grad, scalars, 0.5)
        assert_same_bits(grad, before)


def test_first_momentum_step_does_not_read_the_buffer() -> None:
    scalars = SgdScalars(lr=0.1, momentum=0.9, dampening=0.5, weight_decay=0.0, nesterov=False, first=True)
    for name in IMPLEMENTATIONS:
        param, buffer, grad = torch.ones(33), torch.full((33,), float("nan")), torch.full((33,), 2.0)
        with dispatch.use(name):
            optimizer.sgd_(param, None, buffer, grad, scalars)
        assert torch.equal(buffer, grad)
        assert torch.equal(param, torch.ones(33) - grad * torch.tensor(0.1))


def test_wrong_arguments_are_named() -> None:
    scalars = AdamScalars(lr=1e-3, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0, step=1, decoupled=True)
    x, y = torch.zeros(4), torch.zeros(5)
    with pytest.raises(ValueError, match="grad has 5 elements, param has 4"):
        optimizer.adam_(x, None, x.clone(), x.clone(), y, scalars)
    with pytest.raises(ValueError, match=r"param is torch.bfloat16 without low"):
        optimizer.adam_(x.bfloat16(), None, x.clone(), x.clone(), x.clone(), scalars)
    with pytest.raises(ValueError, match="contiguous 1-D"):
        optimizer.adam_(torch.zeros(8)[::2], None, x.clone(), x.clone(), x.clone(), scalars)
    with pytest.raises(ValueError, match="first update of a range is step 1"):
        AdamScalars(lr=1e-3, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0, step=0, decoupled=True)
    with pytest.raises(ValueError, match="momentum_buffer is absent"):
        optimizer.sgd_(
            x,
            None,
            None,
            x.clone(),
            SgdScalars(lr=1.0, momentum=0.9, dampening=0.0, weight_decay=0.0, nesterov=False, first=False),
        )
