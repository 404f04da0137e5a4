"""Losses: chunks change only the peak of memory, gradients are those of autograd, ignored tokens do not count."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from offload.kernels.loss import linear_cross_entropy, stablemax, stablemax_cross_entropy

TOKENS, WIDTH, VOCABULARY = 37, 24, 101


def problem(dtype: torch.dtype, ignored: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator).to(dtype)
    weight = (torch.randn(VOCABULARY, WIDTH, generator=generator) * 0.3).to(dtype)
    bias = (torch.randn(VOCABULARY, generator=generator) * 0.3).to(dtype)
    target = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    target[:ignored] = -100
    return hidden.requires_grad_(True), weight.requires_grad_(True), bias.requires_grad_(True), target


def exact_stablemax(logits: Tensor, target: Tensor, reduction: str) -> Tensor:
    """The formula on the whole, for autograd."""
    z = logits.double()
    s = torch.where(z >= 0, z + 1, 1 / (1 - z.clamp(max=0)))
    return F.nll_loss((s / s.sum(-1, keepdim=True)).log(), target, reduction=reduction)


@pytest.mark.parametrize("kind", ["softmax", "stablemax"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("chunk_tokens", [1, 10, 37, 1000])
def test_loss_and_gradients_are_those_of_the_unchunked_formula(
    kind: str, reduction: str, with_bias: bool, chunk_tokens: int
) -> None:
    hidden, weight, bias, target = problem(torch.float64)
    inputs = (hidden, weight, bias) if with_bias else (hidden, weight)
    loss = linear_cross_entropy(
        hidden,
        weight,
        target,
        bias if with_bias else None,
        kind=kind,
        reduction=reduction,
        chunk_tokens=chunk_tokens,
    )
    logits = F.linear(hidden, weight, bias if with_bias else None)
    whole = F.cross_entropy if kind == "softmax" else exact_stablemax
    expected = whole(logits, target, reduction=reduction)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    ours, theirs = torch.autograd.grad(loss * 3, inputs), torch.autograd.grad(expected * 3, inputs)
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_no_worse_than_torch(dtype: torch.dtype) -> None:
    """Against float64 of the same inputs, beside the unchunked loss in the same dtype.

    1.5 times its error is allowed: the 1 / tokens of the mean is applied to the finished products, which costs one more
    rounding, and not to the gradient of the logits, where fp16 would lose the small probabilities for good.
    """
    hidden, weight, _, target = problem(dtype)
    wide = [tensor.detach().double().requires_grad_(True) for tensor in (hidden, weight)]
    exact = torch.autograd.grad(F.cross_entropy(F.linear(*wide), target), wide)
    plain = torch.autograd.grad(F.cross_entropy(F.linear(hidden, weight).float(), target), (hidden, weight))
    ours = torch.autograd.grad(linear_cross_entropy(hidden, weight, target, chunk_tokens=10), (hidden, weight))
    for mine, torchs, right in zip(ours, plain, exact, strict=True):
        assert mine.dtype == dtype
        assert (mine.double() - right).norm() <= 1.5 * (torchs.double() - right).norm() + 1e-7 * right.norm()


def test_frozen_inputs_and_inference_make_no_gradients() -> None:
    hidden, weight, _, target = problem(torch.float32)
    with torch.no_grad():
        quiet = linear_cross_entropy(hidden, weight, target)
    assert not quiet.requires_grad
    loss = linear_cross_entropy(hidden, weight.detach(), target)
    assert loss.item() == quiet.item()
    loss.backward()
    assert hidden.grad is not None and weight.grad is None


def test_peak_memory_is_that_of_a_chunk() -> None:
    """Each storage made during the loss is a chunk's logits in float32, or a gradient; never [tokens, vocabulary]."""
    tokens, width, vocabulary, chunk = 512, 16, 4096, 32
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=True)
    target = torch.randint(0, vocabulary, (tokens,))
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        linear_cross_entropy(hidden, weight, target, chunk_tokens=chunk)
    made = [event.cpu_memory_usage for event in record.events() if event.name in ("aten::empty", "aten::empty_strided")]
    allowed_nbytes = chunk * vocabulary * 4
    assert max(made) <= max(allowed_nbytes, vocabulary * width * 4)
    assert tokens * vocabulary * 4 > 8 * max(made)


def test_mean_over_no_tokens_is_nan_like_torch() -> None:
    hidden, weight, _, target = problem(torch.float32)
    target.fill_(-100)
    loss = linear_cross_entropy(hidden, weight, target)
    assert math.isnan(loss.item()) and math.isnan(F.cross_entropy(hidden @ weight.T, target).item())
    assert linear_cross_entropy(hidden, weight, target, reduction="sum").item() == 0.0


def test_stablemax_values() -> None:
    z = torch.tensor([-1.0, 0.0, 3.0])
    assert torch.equal(stablemax(z), torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64) / 5.5)
    assert stablemax(torch.randn(7, 50) * 100).sum(-1).allclose(torch.ones(7, dtype=torch.float64))


@pytest.mark.parametrize("chunk_tokens", [1, 3, 100])
def test_stablemax_gradcheck(chunk_tokens: int) -> None:
    logits = torch.tensor(
        [[-2.0, 1.0, 0.5], [1.0, -1.0, 7.0], [0.3, -0.2, 1.0]], dtype=torch.float64, requires_grad=True
    )
    target = torch.tensor([0, 2, -100])
    for reduction in ("mean", "sum", "none"):
        assert torch.autograd.gradcheck(
            lambda z, reduction=reduction: stablemax_cross_entropy(
                z, target, reduction=reduction, chunk_tokens=chunk_tokens
            ),
            (logits,),
        )


def test_stablemax_learns_where_softmax_has_collapsed() -> None:
    logits = torch.zeros(1, 10)
    logits[0, 0] = 40.0
    target = torch.tensor([0])
    collapsed = logits.clone().requires_grad_(True)
    loss = F.cross_entropy(collapsed, target)
    loss.backward()
    # Softmax: the loss is exactly 0, and so is the gradient of the right class.
    assert loss.item() == 0.0 and collapsed.grad is not None and collapsed.grad[0, 0].item() == 0.0
    stable = logits.clone().requires_grad_(True)
    loss = stablemax_cross_entropy(stable, target)
    loss.backward()
    assert loss.dtype == torch.float64 and loss.item() == pytest.approx(math.log(50 / 41))
    assert stable.grad is not None and stable.grad.dtype == torch.float32 and bool((stable.grad != 0).all())


def test_wrong_arguments_are_named() -> None:
    hidden, weight, bias, target = problem(torch.float32)
    for arguments, options, message in (
        ((hidden, weight, target), {"kind": "hardmax"}, "kind is 'hardmax'"),
        ((hidden, weight, target), {"reduction": "none"}, "reduction is 'none'"),
        ((hidden, weight.T, target), {}, "Flatten batch and sequence"),
        ((hidden, weight.double(), target), {}, "one float dtype"),
        ((hidden, weight, target, bias[:5]), {}, "bias has shape"),
        ((hidden, weight, target), {"chunk_tokens": 0}, "chunk_tokens is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_cross_entropy(*arguments, **options)
    with pytest.raises(ValueError, match="Flatten batch"):
        stablemax_cross_entropy(torch.zeros(2, 3, 4), target)
