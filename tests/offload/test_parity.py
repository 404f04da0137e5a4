"""Training through the engine is training in plain torch: same first bits in fp32, and the same road after that."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from offload import SGD, Adam, AdamW, OffloadConfig

NUM_STEPS = 20
LOSS_RTOL = 1e-6
WEIGHTS_RTOL = 1e-3

OPTIMIZERS: dict[str, tuple[Any, Callable[[Any], torch.optim.Optimizer]]] = {
    "adamw": (AdamW(lr=1e-3, weight_decay=0.1), lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1)),
    "adam": (Adam(lr=1e-3, weight_decay=0.01), lambda p: torch.optim.Adam(p, lr=1e-3, weight_decay=0.01)),
    "momentum": (SGD(lr=0.1, momentum=0.9), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
    "dampened": (
        SGD(lr=0.1, momentum=0.9, dampening=0.5, weight_decay=1e-4),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5, weight_decay=1e-4),
    ),
    "nesterov": (
        SGD(lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4),
    ),
    "sgd": (SGD(lr=0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
}


def both(
    kit: SimpleNamespace, optimizer: str, micro_batches: int = 1, clip: float | None = None, **model: Any
) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """Train the same model both ways; returns (ours, torch's, the weights before)."""
    spec, make_optimizer = OPTIMIZERS[optimizer]
    original = kit.TinyGPT(**model)
    start = {name: p.detach().clone() for name, p in original.named_parameters()}
    data = kit.batches(NUM_STEPS * micro_batches)
    plain = kit.plain_run(kit.clone(original), make_optimizer, data, micro_batches, clip)
    config = OffloadConfig(dtype=torch.float32, device="cpu", micro_batches=micro_batches, clip_grad_norm=clip)
    ours = kit.engine_run(original, spec, config, data)
    return ours, plain, start


def assert_parity(kit: SimpleNamespace, ours: Any, plain: Any, start: dict[str, torch.Tensor]) -> None:
    assert plain.losses[-1] != plain.losses[0], "the run must move for the comparison to mean anything"
    assert ours.losses[0] == plain.losses[0]
    kit.assert_same_grads(ours.first_grads, plain.first_grads)
    for mine, theirs in zip(ours.losses, plain.losses, strict=True):
        assert mine == pytest.approx(theirs, rel=LOSS_RTOL, abs=0)
    for mine, theirs in zip(ours.norms, plain.norms, strict=False):  # plain torch has norms only where it clips
        assert mine == pytest.approx(theirs, rel=1e-5, abs=0)
    assert kit.relative_difference(ours.weights, plain.weights, start) <= WEIGHTS_RTOL


@pytest.mark.parametrize("clip", [None, 0.5], ids=["free", "clipped"])
@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_adamw_follows_torch(
    kit: SimpleNamespace, micro_batches: int, clip: float | None, tied: bool, frozen: bool
) -> None:
    ours, plain, start = both(kit, "adamw", micro_batches, clip, tied=tied, frozen=frozen)
    if clip is not None:
        assert min(plain.norms) > clip, "clipping must bite"
    assert_parity(kit, ours, plain, start)
    if frozen:
        frozen_names = [name for name in start if name.startswith("blocks.0.")]
        assert frozen_names and all(kit.bits(ours.weights[n]) == kit.bits(start[n]) for n in frozen_names)


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("clip", [None, 0.5], ids=["free", "clipped"])
def test_dropout_draws_what_torch_draws(kit: SimpleNamespace, micro_batches: int, clip: float | None) -> None:
    ours, plain, start = both(kit, "adamw", micro_batches, clip, dropout=0.1)
    assert_parity(kit, ours, plain, start)
    again = kit.plain_run(kit.TinyGPT(dropout=0.0), OPTIMIZERS["adamw"][1], kit.batches(1))
    assert again.losses[0] != plain.losses[0], "dropout must change the loss for this test to mean anything"


@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if name != "adamw"])
@pytest.mark.parametrize("micro_batches", [1, 4])
def test_other_optimizers_follow_torch(kit: SimpleNamespace, optimizer: str, micro_batches: int) -> None:
    assert_parity(kit, *both(kit, optimizer, micro_batches, dropout=0.1))


def test_maximize_follows_torch(kit: SimpleNamespace) -> None:
    original = kit.TinyGPT()
    start = {name: p.detach().clone() for name, p in original.named_parameters()}
    data = kit.batches(1) * 5
    plain = kit.plain_run(kit.clone(original), lambda p: torch.optim.AdamW(p, lr=1e-3, maximize=True), data)
    ours = kit.engine_run(original, AdamW(lr=1e-3, maximize=True), OffloadConfig(dtype=torch.float32), data)
    assert_parity(kit, ours, plain, start)
    assert plain.losses[-1] > plain.losses[0], "the loss must climb"
