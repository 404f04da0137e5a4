"""Every kind of state travels, and units, chunks and budgets of the run that saved do not show."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from offload import SGD, AdamW, OffloadConfig, OffloadEngine, TorchOptimizer

KINDS: dict[str, dict[str, Any]] = {
    "sgd": {"spec": SGD(lr=0.01, momentum=0.9)},
    "groups": {"spec": AdamW(lr=1e-2, groups=lambda name, _: {"weight_decay": 0.0 if "bias" in name else 0.1})},
    "average": {"ema_decay": 0.9},
    "fp16": {"dtype": torch.float16, "loss_scale": 1024.0},
    "torch": {"spec": TorchOptimizer(torch.optim.NAdam, lr=1e-3)},
    "factored": {"spec": TorchOptimizer(torch.optim.Adafactor, lr=1e-3)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_state_travels(runs: SimpleNamespace, tmp_path: Path, kind: str) -> None:
    settings = KINDS[kind]
    with runs.build(device="cpu", **settings) as engine:
        runs.seed_all(4)
        runs.train(engine, 2)
        path = engine.save(tmp_path / "run")
        expected = runs.train(engine, 2)
        final = runs.snapshot(engine)
    nvme = {"nvme": tmp_path / "nvme", "homes": runs.NVME, "device": "cpu", "host_memory": "16MiB"}
    with runs.build(seed=3, **settings, **nvme) as engine:
        engine.resume(path)
        assert runs.train(engine, 2) == expected
        assert runs.differing(runs.snapshot(engine), final) == []


def test_another_cut_into_units(kit: Any, tmp_path: Path) -> None:
    """A budget so small that blocks are taken apart: other units, other files, the same bits. Tied weights are one."""
    data = kit.batches(6)

    def steps(engine: OffloadEngine, first: int, last: int) -> list[float]:
        losses = []
        for x, y in data[first:last]:
            loss = engine(x, y)
            engine.backward(loss)
            engine.step()
            losses.append(float(loss.detach()))
        return losses

    def build(**settings: Any) -> OffloadEngine:
        model = kit.TinyGPT(width=64, depth=3)
        return OffloadEngine(model, AdamW(lr=1e-2), OffloadConfig(dtype=torch.float32, device="cpu", **settings))

    def nvme(folder: str) -> Any:
        return lambda budget: build(
            nvme=tmp_path / folder, homes=kit.ALL_NVME, host_memory=budget, overwrite=True, activation_memory=0
        )

    with build() as engine:
        whole = steps(engine, 0, 6)
        num_units = len(engine._parts.layouts)
        expected = kit.state_of(engine)
    made: list[OffloadEngine] = []
    smallest = kit.smallest_budget(lambda budget: made.append(nvme("probe")(budget)))
    made.pop().close()
    for number, (before, after) in enumerate(
        [(build, lambda: nvme("a")(smallest)), (lambda: nvme("b")(smallest), build)]
    ):
        with before() as engine:
            losses = steps(engine, 0, 3)
            engine.save(tmp_path / f"run{number}")
            counts = {len(engine._parts.layouts)}
        with after() as engine:
            engine.resume(tmp_path / f"run{number}")
            counts.add(len(engine._parts.layouts))
            losses += steps(engine, 3, 6)
            assert losses == whole
            kit.assert_same_state(kit.state_of(engine), expected)
        assert num_units in counts
        assert len(counts) == 2


def test_the_weights_are_files_that_others_read(runs: SimpleNamespace, tmp_path: Path) -> None:
    with runs.build(frozen=True, device="cpu") as engine:
        runs.train(engine, 1)
        path = engine.save(tmp_path)
        expected = engine.state_dict()
    found: dict[str, torch.Tensor] = {}
    for name in ("model-*.safetensors", "frozen-*.safetensors", "buffers.safetensors"):
        for file in path.glob(name):
            found.update(load_file(file))
    assert runs.differing(found, expected) == []


def test_a_model_without_trainable_parameters_and_one_without_buffers(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).requires_grad_(False)
    with OffloadEngine(model, AdamW(), OffloadConfig(device="cpu")) as engine:
        path = engine.save(tmp_path)
        assert engine.resume(path).step == 0
        assert not (path / "buffers.safetensors").exists()
