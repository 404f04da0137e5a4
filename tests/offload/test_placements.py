"""Where bytes live never changes a bit: in memory, mixed, on NVMe, on a device with a memory of its own."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from offload import SGD, AdamW, OffloadConfig, OffloadEngine
from offload.scheduler.devices import FakeDevice

CHUNK_NUMEL = 4096  # the block below has 12.7k elements: four chunks, with parameters that straddle two
NUM_STEPS = 3
SPEC = AdamW(lr=1e-2, weight_decay=0.1)
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload.layout.CHUNK_NUMEL", CHUNK_NUMEL)


class Placements:
    """Builds the configuration of every placement; budgets are what the planner says is smallest, times a factor."""

    def __init__(self, kit: SimpleNamespace, folder: Path, make_model: Callable[[], nn.Module], spec: Any) -> None:
        self._kit = kit
        self._folder = folder
        self._make_model = make_model
        self._spec = spec
        self._count = itertools.count()

    def nvme(self) -> Path:
        """A fresh directory: a store is one run's."""
        return self._folder / f"run{next(self._count)}"

    def config(self, placement: str, seed: int = 0, **settings: Any) -> OffloadConfig:
        settings = {"clip_grad_norm": 0.5, **settings}
        if placement == "memory":
            return OffloadConfig(device="cpu", **settings)
        if placement == "mixed":
            return self._with_host_budget(4.5, device="cpu", nvme=self.nvme(), **settings)
        if placement == "tight":
            settings = {"activation_memory": 0, **settings}
            return self._with_host_budget(1.0, device="cpu", nvme=self.nvme(), **settings)
        if placement == "nvme":
            return OffloadConfig(device="cpu", nvme=self.nvme(), homes=self._kit.ALL_NVME, **settings)
        fake = {"device": FakeDevice(seed=seed, max_delay_s=5e-4), **settings}
        if placement == "fake":
            return self._with_device_budget(1.6, **fake)
        if placement == "fake tight":
            return self._with_device_budget(1.0, **{"activation_memory": 0, **fake})
        assert placement == "fake nvme"
        return self._with_device_budget(1.6, nvme=self.nvme(), homes=self._kit.ALL_NVME, **fake)

    def _with_host_budget(self, factor: float, **settings: Any) -> OffloadConfig:
        smallest = self._smallest("host_memory", dict(settings))
        return OffloadConfig(host_memory=int(smallest * factor), **settings)

    def _with_device_budget(self, factor: float, **settings: Any) -> OffloadConfig:
        smallest = self._smallest("device_memory", dict(settings))
        return OffloadConfig(device_memory=int(smallest * factor), **settings)

    def _smallest(self, name: str, settings: dict[str, Any]) -> int:
        def build(budget: int) -> None:
            if "nvme" in settings:
                settings["nvme"] = self.nvme()
            OffloadEngine(self._make_model(), self._spec, OffloadConfig(**{name: budget}, **settings)).close()

        return self._kit.smallest_budget(build)


@pytest.fixture
def placements(kit: SimpleNamespace, tmp_path: Path) -> Placements:
    return Placements(kit, tmp_path, lambda: kit.TinyGPT(dropout=0.1), SPEC)


OTHERS = ["mixed", "tight", "nvme", "fake", "fake tight", "fake nvme"]


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_same_bits_everywhere(
    kit: SimpleNamespace, placements: Placements, dtype: torch.dtype, micro_batches: int
) -> None:
    data = kit.batches(NUM_STEPS * micro_batches)

    def run(placement: str) -> Any:
        config = placements.config(placement, dtype=dtype, micro_batches=micro_batches)
        return kit.engine_run(kit.TinyGPT(dropout=0.1), SPEC, config, data)

    assert sum(p.numel() for p in kit.Block(32, 2, 0.0).parameters()) > 3 * CHUNK_NUMEL, "units of several chunks"
    in_memory = run("memory")
    assert min(in_memory.norms) > 0.5, "clipping must bite"
    assert len(set(in_memory.losses)) == len(in_memory.losses)
    for placement in OTHERS:
        kit.assert_same_run(run(placement), in_memory)


@pytest.mark.parametrize("kinds", [("param",), ("grad",), ("states",), ("param", "states"), ("grad", "states")])
@pytest.mark.parametrize("durability", ["step", "none"])
def test_each_kind_on_nvme_alone(
    kit: SimpleNamespace, placements: Placements, kinds: tuple[str, ...], durability: str
) -> None:
    data = kit.batches(4)
    settings = {"micro_batches": 2, "device": "cpu", "clip_grad_norm": 0.5}
    in_memory = kit.engine_run(kit.TinyGPT(), SPEC, OffloadConfig(**settings), data)
    homes = {kind: "nvme" if kind in kinds else "host" for kind in kit.ALL_NVME}
    config = OffloadConfig(nvme=placements.nvme(), homes=homes, durability=durability, **settings)
    kit.assert_same_run(kit.engine_run(kit.TinyGPT(), SPEC, config, data), in_memory)


@pytest.mark.parametrize("seed", range(3))
def test_any_timing_of_copies_gives_the_same_bits(kit: SimpleNamespace, placements: Placements, seed: int) -> None:
    data = kit.batches(4)
    in_memory = kit.engine_run(kit.TinyGPT(dropout=0.1), SPEC, placements.config("memory", micro_batches=2), data)
    for placement in ("fake", "fake nvme"):
        config = placements.config(placement, seed=seed, micro_batches=2)
        kit.assert_same_run(kit.engine_run(kit.TinyGPT(dropout=0.1), SPEC, config, data), in_memory)


def test_slots_are_evicted_and_reused(kit: SimpleNamespace, placements: Placements) -> None:
    """The device is smaller than the parameters, so a step must upload more bytes than it can hold."""
    uploads: list[int] = []
    config = placements.config("fake", dtype=torch.float32)
    with OffloadEngine(kit.TinyGPT(), SPEC, config) as engine:
        for x, y in kit.batches(2):
            engine.backward(engine(x, y))
            uploads.append(engine.step().nbytes["h2d"])
        memory = engine.memory
    staged_nbytes = 4 * sum(p.numel() for p in kit.TinyGPT().parameters())
    assert memory.device_budget_nbytes < staged_nbytes
    assert 0 < memory.device_peak_nbytes <= memory.device_budget_nbytes
    assert min(uploads) > staged_nbytes


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_mixed_plan_uses_both_tiers(
    kit: SimpleNamespace, placements: Placements, dtype: torch.dtype, micro_batches: int
) -> None:
    config = placements.config("mixed", dtype=dtype, micro_batches=micro_batches)
    with OffloadEngine(kit.TinyGPT(), SPEC, config) as engine:
        table = str(engine)
        memory = engine.memory
    assert "KiB host" in table and "KiB nvme" in table, table
    assert 0 < memory.host_used_nbytes <= memory.host_peak_nbytes <= memory.host_budget_nbytes


def test_all_nvme_moves_every_byte(kit: SimpleNamespace, placements: Placements) -> None:
    """fp32, one micro-batch: 4 B of parameter, 4 B of gradient and 8 B of moments per element at least are written, and
    the latter two read; parameters of units that are still staged are not read again."""
    with OffloadEngine(kit.TinyGPT(), SPEC, placements.config("nvme", dtype=torch.float32)) as engine:
        for x, y in kit.batches(2):  # a step's update falls into the next one
            engine.backward(engine(x, y))
            moved = engine.step().nbytes
        used = engine.memory.host_used_nbytes
    numel = sum(p.numel() for p in kit.TinyGPT().parameters())
    assert moved["write"] >= 16 * numel
    assert moved["read"] >= 12 * numel
    assert used > 0


def alignments(module: nn.Module) -> Iterator[tuple[str, int]]:
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.numel():
            yield name, parameter.data_ptr() % 64


class Ragged(nn.Module):
    """Odd sizes everywhere, so that alignment cannot come by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(3, 7), nn.Linear(7, 5))
        self.scale = nn.Parameter(torch.ones(1))
        self.frozen = nn.Linear(5, 13)
        self.frozen.requires_grad_(False)
        self.last = nn.Linear(13, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.frozen(self.first(x)) * self.scale).square().mean()


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("placement", ["memory", *OTHERS])
def test_parameters_start_on_64_bytes_in_every_placement(
    kit: SimpleNamespace, tmp_path: Path, placement: str, dtype: torch.dtype
) -> None:
    seen: dict[str, set[int]] = {}
    model = Ragged()

    def look(module: nn.Module, args: Any) -> None:
        for name, misalignment in alignments(module):
            seen.setdefault(f"{type(module).__name__}.{name}", set()).add(misalignment)

    for part in model.modules():
        if next(part.children(), None) is None:
            part.register_forward_pre_hook(look)
    placements = Placements(kit, tmp_path, Ragged, SPEC)
    config = placements.config(placement, dtype=dtype, keep_fp32=["first.1.weight"])
    with OffloadEngine(model, SPEC, config) as engine:
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):  # one weight stays fp32
                loss = engine(torch.ones(2, 3, dtype=dtype))
            engine.backward(loss)
            engine.step()
        with torch.no_grad():
            seen["private copy"] = {model.scale.data_ptr() % 64, model.last.weight.data_ptr() % 64}
    assert len(seen) >= 3
    assert all(found == {0} for found in seen.values()), seen


def test_two_threads_give_the_same_bits_in_every_placement(kit: SimpleNamespace, placements: Placements) -> None:
    torch.set_num_threads(2)
    data = kit.batches(2, batch=8)
    runs = [
        kit.engine_run(kit.TinyGPT(dropout=0.1), SPEC, placements.config(placement), data)
        for placement in ("memory", "nvme", "fake")
    ]
    for run in runs[1:]:
        kit.assert_same_run(run, runs[0])


def test_threads_stay_those_of_the_start(kit: SimpleNamespace, placements: Placements) -> None:
    """Kernels round differently with another number of threads, so a run keeps the number that it started with."""
    seen: set[int] = set()
    model = kit.TinyGPT()
    model.blocks[0].register_forward_pre_hook(lambda module, args: seen.add(torch.get_num_threads()))
    torch.set_num_threads(2)
    with OffloadEngine(model, SPEC, placements.config("memory")) as engine:
        for threads in (2, 1):
            torch.set_num_threads(threads)
            x, y = kit.batches(1)[0]
            engine.backward(engine(x, y))
            engine.step()
    assert seen == {2}


@pytest.mark.parametrize("spec", [SGD(lr=0.1), SGD(lr=0.1, momentum=0.9, nesterov=True)], ids=["plain", "nesterov"])
def test_sgd_has_the_same_bits_everywhere(kit: SimpleNamespace, tmp_path: Path, spec: SGD) -> None:
    placements = Placements(kit, tmp_path, kit.TinyGPT, spec)
    data = kit.batches(2)
    runs = [
        kit.engine_run(kit.TinyGPT(), spec, placements.config(placement), data)
        for placement in ("memory", "nvme", "fake")
    ]
    for run in runs[1:]:
        kit.assert_same_run(run, runs[0])
