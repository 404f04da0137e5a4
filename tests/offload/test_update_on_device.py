"""Updates on the device: the bits of the host's, the bytes of the layout over the link, and memory of the budget."""

from __future__ import annotations

import re
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offload import SGD, AdamW, BudgetTooSmall, OffloadConfig, OffloadEngine
from offload.engine import EngineFailed
from offload.plan import device_chunks
from offload.scheduler.chrome import read_trace
from offload.scheduler.devices import Event, FakeDevice, HostEvent
from offload.scheduler.fence import Fence

ALL_NVME = {"param": "nvme", "states": "nvme", "grad": "nvme"}
PATIENCE_S = 20
CHUNK = 2048  # elements: units of the models here have several chunks


class Config(OffloadConfig):
    """With chunks as small as they can be."""

    def chunk_numel(self) -> int:
        return CHUNK


def config(folder: Path | None = None, device: FakeDevice | None = None, **settings: Any) -> Config:
    base: dict[str, Any] = {"device": device or FakeDevice(seed=1, max_delay_s=3e-4), "device_memory": "1MiB"}
    if folder is not None:
        base |= {"nvme": folder, "homes": ALL_NVME}
    return Config(**(base | settings))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.float().square().mean()


def one_step(engine: OffloadEngine, number: int) -> Any:
    dtype = engine.config.dtype
    engine.backward(engine(torch.randn(4, 64, generator=torch.Generator().manual_seed(number)).to(dtype)))
    return engine.step()


@pytest.mark.parametrize("place", ["memory", "nvme"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_bits_are_the_hosts(kit: SimpleNamespace, place: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """With clipping, two micro-batches, and a model of parameters of both kinds; copies and kernels take any time."""

    def run(update_on: Any, seed: int) -> Any:
        folder = tmp_path / f"{update_on}{seed}" if place == "nvme" else None
        settings = config(
            folder, FakeDevice(seed=seed, max_delay_s=3e-4), dtype=dtype, keep_fp32=["*norm*"], micro_batches=2,
            clip_grad_norm=0.5, update_on=update_on,
        )  # fmt: skip
        return kit.engine_run(kit.TinyGPT(frozen=True), AdamW(lr=1e-2, weight_decay=0.1), settings, kit.batches(8))

    expected = run("host", 0)
    assert all(norm > 0.5 for norm in expected.norms), "clipping must matter"
    for update_on, seed in (("device", 1), ("device", 2), (0.5, 3)):
        kit.assert_same_run(run(update_on, seed), expected)


@pytest.mark.parametrize("update", ["next_forward", "speculative", "backward", "step"])
def test_bits_are_the_hosts_whenever_it_is_made(kit: SimpleNamespace, update: str, tmp_path: Path) -> None:
    def run(update_on: Any) -> Any:
        settings = config(tmp_path / str(update_on), update=update, update_on=update_on, device_memory="96KiB")
        return kit.engine_run(kit.TinyGPT(), SGD(lr=0.1, momentum=0.9, nesterov=True), settings, kit.batches(5))

    kit.assert_same_run(run("device"), run("host"))


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize(("update_on", "share"), [("device", 1.0), (0.5, 0.5), (0.3, 0.3)])
def test_bytes_over_the_link_are_those_of_the_chunks(
    update_on: Any, share: float, micro_batches: int, tmp_path: Path
) -> None:
    settings = config(update="step", update_on=update_on, micro_batches=micro_batches)
    steps = 3
    with OffloadEngine(Stack(), AdamW(), settings) as engine:
        engine.trace(tmp_path / "trace.json")
        layouts = engine._parts.layouts
        for step in range(steps):
            for number in range(micro_batches - 1):
                engine.backward(engine(torch.ones(4, 64, dtype=torch.bfloat16) * number))
            one_step(engine, step)
    moved: Counter[str] = Counter()
    for step_record in read_trace(tmp_path / "trace.json"):
        for span in step_record.spans:
            if span.kind == "update":
                moved[span.lane] += span.nbytes
    chosen = set(device_chunks(layouts, share))
    numel = sum(chunk.numel for chunk in chosen)
    on_host = sum(chunk.numel for layout in layouts for chunk in layout.chunks if chunk not in chosen)
    gradient = 2 if micro_batches == 1 else 4
    up = 2 + (2 + 4 + 4) + gradient  # param, states (low half and two moments), gradient
    assert moved["h2d"] == steps * numel * up
    assert moved["d2h"] == steps * numel * (up - gradient), "the gradient is not brought back"
    assert moved["compute"] == moved["h2d"]
    assert moved["cpu"] == steps * on_host * up
    assert numel + on_host == 3 * 3 * CHUNK and abs(numel / (numel + on_host) - share) < 1 / 9


def layouts_of(*numbers: int) -> list[Any]:
    """Stand-ins for layouts of so many chunks, and a frozen one each."""
    return [
        SimpleNamespace(
            chunks=[*(SimpleNamespace(segment="split") for _ in range(n)), SimpleNamespace(segment="frozen")]
        )
        for n in numbers
    ]


def test_a_share_is_spread_evenly_over_all_units() -> None:
    layouts: list[Any] = layouts_of(1, 1, 1, 1, 4)
    chunks = [chunk for layout in layouts for chunk in layout.chunks if chunk.segment != "frozen"]

    def chosen(share: float) -> list[int]:
        mine = device_chunks(layouts, share)
        return [k for k, chunk in enumerate(chunks) if any(chunk is one for one in mine)]

    assert chosen(0.0) == []
    assert chosen(1.0) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert chosen(0.5) == [1, 3, 5, 7], "also where every unit is one chunk"
    assert chosen(0.25) == [3, 7]
    assert chosen(0.75) == [1, 2, 3, 5, 6, 7]


@pytest.mark.parametrize("update_on", ["device", 0.5])
def test_ring_on_the_device_is_part_of_its_budget(update_on: Any, tmp_path: Path) -> None:
    def build(nbytes: int) -> OffloadEngine:
        folder = tmp_path / str(nbytes)
        return OffloadEngine(Stack(), AdamW(), config(folder, device_memory=nbytes, update_on=update_on))

    with pytest.raises(BudgetTooSmall, match=r"an update there .* for one chunk") as refusal:
        build(1)
    unit = 3 * CHUNK * 2  # 64 * 64 + 64 elements in whole chunks
    assert refusal.value.needed_nbytes == unit + CHUNK * (2 + 10 + 2)
    for nbytes in (refusal.value.needed_nbytes, refusal.value.needed_nbytes + 65536, 1 << 20):
        with build(nbytes) as engine:
            for step in range(3):
                one_step(engine, step)
            engine.flush()
            memory, plan = engine.memory, engine._parts.plan
            assert memory.device_peak_nbytes <= memory.device_budget_nbytes == nbytes
            assert plan.device_nbytes + plan.device_ring_nbytes == nbytes
            assert engine._parts.device_ring.pool.statistics().peak_nbytes >= CHUNK * 14
            assert engine._parts.device_ring.pool.statistics().leased_nbytes == 0
    assert plan.device_ring_nbytes == 4 * CHUNK * 14
    with pytest.raises(BudgetTooSmall):
        build(refusal.value.needed_nbytes - 4096)


def test_nothing_is_kept_for_updates_on_the_host() -> None:
    with OffloadEngine(Stack(), AdamW(), config()) as engine:
        assert engine._parts.plan.device_ring_nbytes == 0
        assert engine._parts.plan.device_nbytes == 1 << 20


class BothWays(FakeDevice):
    """A download does not end before an upload of another chunk has begun, nor does that upload before a download."""

    def __init__(self) -> None:
        super().__init__(max_delay_s=1e-4)
        self.watching = False
        self.down, self.up_beside = threading.Event(), threading.Event()

    def upload(self, device_buffer: Tensor, host_buffer: Tensor, after: Fence | None) -> None:
        super().upload(device_buffer, host_buffer, after)
        if self.watching and self.down.is_set():
            self.up_beside.set()

    def download(self, host_buffer: Tensor, device_buffer: Tensor, after: Fence | None) -> None:
        if self.watching:
            self.down.set()
            assert self.up_beside.wait(PATIENCE_S), "no upload while a download is under way"
        super().download(host_buffer, device_buffer, after)


def test_both_directions_of_the_link_work_at_once() -> None:
    device = BothWays()
    with OffloadEngine(Stack(), AdamW(), config(device=device, update="step", update_on="device")) as engine:
        engine.backward(engine(torch.ones(4, 64, dtype=torch.bfloat16)))
        engine._gradients.wait()
        device.watching = True
        engine.step()
        device.watching = False
    assert device.up_beside.is_set()


class LateAllocations(FakeDevice):
    """What the allocator hands out has been compute's before, which has not passed yet."""

    def __init__(self) -> None:
        super().__init__(max_delay_s=1e-4)
        self.fences: list[LateAllocations.Late] = []
        self._training_thread = threading.current_thread()

    class Late(HostEvent):
        __slots__ = ("was_waited_for",)

        def __init__(self) -> None:
            super().__init__()
            self.was_waited_for = False

        def has_passed(self) -> bool:
            return self.was_waited_for

        def synchronize(self) -> None:
            self.was_waited_for = True

    def record(self) -> Event:
        if threading.current_thread() is self._training_thread:
            return HostEvent()
        self.fences.append(self.Late())
        return self.fences[-1]


def test_first_upload_waits_for_what_the_allocator_had_the_memory_for() -> None:
    device = LateAllocations()
    with OffloadEngine(Stack(), AdamW(), config(device=device, update="step", update_on="device")) as engine:
        one_step(engine, 0)
        parts = engine._parts
        num_buffers = sum(len(found) for pool in (parts.slots, parts.device_ring.pool) for found in pool._warm.values())
        waited_for = [fence.was_waited_for for fence in device.fences]  # the end waits for all: their memory goes
    assert len(waited_for) >= num_buffers >= 1 and all(waited_for)


class BrokenKernel(FakeDevice):
    def compute(self, work: Any, *args: Any) -> None:
        raise RuntimeError("illegal address")


@pytest.mark.parametrize("place", ["memory", "nvme"])
def test_kernel_that_fails_is_an_update_that_broke_off(place: str, tmp_path: Path) -> None:
    folder = tmp_path if place == "nvme" else None
    with OffloadEngine(Stack(), AdamW(), config(folder, BrokenKernel(max_delay_s=1e-4), update_on="device")) as engine:
        with pytest.raises(RuntimeError, match="illegal address"):
            for step in range(2):
                one_step(engine, step)
        with pytest.raises(EngineFailed, match=r"illegal address.*two different steps"):
            one_step(engine, 2)
        ring = engine._parts.device_ring.pool
    assert ring.statistics().leased_nbytes == 0


def test_without_a_device_there_is_nothing_to_update_on() -> None:
    with pytest.raises(ValueError, match=re.escape("update_on=0.5, but without an accelerator")) as refusal:
        OffloadEngine(Stack(), AdamW(), OffloadConfig(device="cpu", update_on=0.5))
    assert 'update_on="host"' in str(refusal.value)


def test_kernels_are_tuned_where_the_device_will_run_them(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned: list[torch.device] = []
    monkeypatch.setattr("offload.assembly.tune_once", tuned.append)
    for update_on, times in (("host", 0), (0.5, 1)):
        OffloadEngine(Stack(), AdamW(), config(update_on=update_on)).close()
        assert tuned == [torch.device("cpu")] * times
