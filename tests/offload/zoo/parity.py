"""Trains one architecture in plain torch and through an engine, and measures how far apart they are."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from offload import AdamW, BudgetTooSmall, OffloadConfig, OffloadEngine

from .models import ARCHITECTURES, Architecture

NUM_STEPS = 3
OPTIMIZER = {"lr": 1e-3, "weight_decay": 0.1, "eps": 1e-6}
"""eps is above rounding noise: where a gradient's true value is zero (the bias of a key or before a norm), Adam with a
smaller one makes full steps of noise."""

ALL_NVME = {"param": "nvme", "states": "nvme", "grad": "nvme"}


@dataclass
class Record:
    """What a run leaves: a loss per step, the gradients of each step by name, weights and buffers at the end."""

    losses: list[float] = field(default_factory=list)
    grads: list[dict[str, Tensor]] = field(default_factory=list)
    start: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    num_units: int = 0


@dataclass(frozen=True)
class Distance:
    """How far an engine's run is from plain torch's.

    Args:
        num_units: units of the engine.
        first_bits: whether the first loss and every gradient of the first step have torch's bits.
        first: the largest difference of a gradient of the first step, relative to the largest element of all gradients.
        losses: the largest relative difference of a loss.
        weights: norm of the difference of the weights at the end, over the norm of their whole change.
        buffers: the largest difference of a buffer at the end, relative to its largest element if that is above 1.
    """

    num_units: int
    first_bits: bool
    first: float
    losses: float
    weights: float
    buffers: float


def build(one: Architecture) -> nn.Module:
    """The model, with the same values at each call, in training mode."""
    torch.manual_seed(0)
    return one.make().train()


@functools.cache
def plain_run(name: str) -> Record:
    """`NUM_STEPS` steps as anybody writes them."""
    one = ARCHITECTURES[name]
    model = build(one)
    run = Record(start={n: p.detach().clone() for n, p in model.named_parameters()})
    optimizer = torch.optim.AdamW(model.parameters(), **OPTIMIZER)
    torch.manual_seed(5)
    for step in range(NUM_STEPS):
        batch = one.batch(step)
        loss = one.loss(model(**batch), batch)
        loss.backward()
        run.losses.append(float(loss.detach()))
        run.grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
        optimizer.zero_grad()
    run.weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    run.buffers = {n: b.clone() for n, b in model.named_buffers()}
    return run


def engine_run(name: str, settings: Mapping[str, Any]) -> Record:
    """The same steps through an engine with everything on NVMe."""
    one = ARCHITECTURES[name]
    model = build(one)
    run = Record()
    config = OffloadConfig(dtype=torch.float32, homes=ALL_NVME, overwrite=True, **settings)
    with OffloadEngine(model, AdamW(**OPTIMIZER), config) as engine:
        lines = str(engine).splitlines()
        run.num_units = [line.startswith("host memory:") for line in lines].index(True) - 1  # but the table's head
        torch.manual_seed(5)
        for step in range(NUM_STEPS):
            batch = one.batch(step)
            loss = one.loss(engine(**batch), batch)
            engine.backward(loss)
            run.losses.append(float(loss.detach()))
            with engine.gather("*") as parameters:
                names = dict(model.named_parameters())
                run.grads.append({n: parameters[n].grad for n in names if parameters[n].grad is not None})
            engine.step()
        with engine.gather("*") as parameters:
            run.weights = {n: parameters[n].value for n in names}
        run.buffers = {n: b.clone() for n, b in model.named_buffers()}
    return run


def smallest_settings(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` with the smallest host_memory (and device_memory, with a fake device) that works, found as a user
    would find it: from what the refusals say."""
    least = {**settings, "host_memory": 1}
    if settings["device"] == "fake":
        least["device_memory"] = 1
    for _ in range(8):
        try:
            model = build(ARCHITECTURES[name])
            config = OffloadConfig(dtype=torch.float32, homes=ALL_NVME, overwrite=True, **least)
            OffloadEngine(model, AdamW(**OPTIMIZER), config).close()
        except BudgetTooSmall as refusal:
            least[refusal.setting] = refusal.needed_nbytes
        else:
            return least
    raise AssertionError(f"eight refusals in a row, last with {least}")


def distance(ours: Record, torchs: Record) -> Distance:
    """Raises: AssertionError if the two do not even have gradients for the same parameters."""
    for step, (mine, theirs) in enumerate(zip(ours.grads, torchs.grads, strict=True)):
        assert mine.keys() == theirs.keys(), f"step {step}: {sorted(mine.keys() ^ theirs.keys())} differ in presence"
    largest = max(float(g.abs().max()) for g in torchs.grads[0].values() if g.numel())
    gaps = [float((ours.grads[0][n] - g).abs().max()) for n, g in torchs.grads[0].items() if g.numel()]
    change = sum(float((w - torchs.start[n]).double().square().sum()) for n, w in torchs.weights.items())
    gap = sum(float((ours.weights[n] - w).double().square().sum()) for n, w in torchs.weights.items())
    assert ours.buffers.keys() == torchs.buffers.keys()
    return Distance(
        num_units=ours.num_units,
        first_bits=ours.losses[0] == torchs.losses[0]
        and all(_bits(ours.grads[0][n]) == _bits(g) for n, g in torchs.grads[0].items()),
        first=max(gaps) / largest,
        losses=max(abs(a - b) / abs(b) for a, b in zip(ours.losses, torchs.losses, strict=True)),
        weights=(gap / change) ** 0.5,
        buffers=max((_gap(ours.buffers[n], b) for n, b in torchs.buffers.items()), default=0.0),
    )


def _gap(ours: Tensor, torchs: Tensor) -> float:
    if not torchs.numel():
        return 0.0
    return float((ours.double() - torchs.double()).abs().max()) / max(1.0, float(torchs.double().abs().max()))


def _bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
