"""The protocol of buffers, checked after the fact over whole runs: nobody writes what another uses, nobody uses what it
has given back, no pool exceeds its budget. And what must stay flat over many steps, does."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from offload import AdamW, BudgetTooSmall, OffloadConfig, OffloadEngine
from offload.homes import Home
from offload.journey import Journeys
from offload.residency import Residency
from offload.scheduler.devices import FakeDevice
from offload.update import UnitUpdate

from .audit import Audit

ALL_NVME = {"param": "nvme", "states": "nvme", "grad": "nvme"}
PLACES: dict[str, dict[str, Any]] = {
    "memory": {"device": "cpu", "host_memory": "64MiB"},
    "nvme": {"device": "cpu", "host_memory": "1MiB", "homes": ALL_NVME},
    "states": {"device": "cpu", "host_memory": "1MiB", "homes": {"param": "host", "grad": "host", "states": "nvme"}},
    "fake": {"device_memory": "160KiB", "host_memory": "2MiB"},
    "fake nvme": {"device_memory": "160KiB", "host_memory": "1MiB", "homes": ALL_NVME},
    "fake, updates there": {"device_memory": "1MiB", "host_memory": "1MiB", "homes": ALL_NVME, "update_on": 0.7},
}


def settings(place: str, folder: Path) -> dict[str, Any]:
    found = dict(PLACES[place])
    if place.startswith("fake"):
        found["device"] = FakeDevice(seed=1, max_delay_s=3e-4)
    if "nvme" in found.get("homes", {}).values():
        found["nvme"] = folder
    return found


def run(kit: SimpleNamespace, **config: Any) -> Any:
    return kit.engine_run(kit.TinyGPT(depth=3, tied=False), AdamW(lr=1e-2), OffloadConfig(**config), kit.batches(6))


@pytest.mark.parametrize("update", ["next_forward", "speculative", "backward"])
@pytest.mark.parametrize("place", PLACES)
def test_no_two_touch_the_same_bytes_and_no_lease_outlives_itself(
    kit: SimpleNamespace, place: str, update: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(place, tmp_path)
    if update != "next_forward" and "nvme" not in config:
        config["nvme"] = tmp_path
        config.setdefault("homes", {"states": "host"})
    if update != "backward":
        config["clip_grad_norm"] = 2.0
    audit = Audit(monkeypatch)
    run(kit, micro_batches=2, update=update, activation_memory=0, **config)
    assert len(audit.accesses) > 100
    assert audit.check() == []


def test_the_audit_sees_an_update_of_what_compute_uses(
    kit: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guard taken out: units are handed out while their update is pending, and it is made meanwhile."""

    def expect(residency: Residency, updates: Any, after: Any) -> Any:
        made = residency._updates.add(updates, after)
        for index in updates:
            pending = residency._updates.take(index)
            unit = residency._layouts[index].unit
            residency._loop.submit(residency._journeys.update_in_passing(unit, 0, pending))
        return made

    work = UnitUpdate._work

    def slow(update: UnitUpdate, *args: Any) -> None:
        time.sleep(0.01)
        work(update, *args)

    monkeypatch.setattr(UnitUpdate, "_work", slow)
    monkeypatch.setattr(Residency, "expect", expect)
    audit = Audit(monkeypatch)
    run(kit, **settings("memory", tmp_path))
    assert any("compute" in problem and "update" in problem for problem in audit.check())


def test_the_audit_sees_a_slot_given_away_while_it_is_stored_from(
    kit: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Home.write

    async def late(home: Home, index: int, source: torch.Tensor) -> None:
        await asyncio.sleep(0.02)
        await write(home, index, source)

    monkeypatch.setattr(Home, "write", late)
    monkeypatch.setattr(Journeys, "is_storing", lambda self, unit: False)
    smallest = {**settings("nvme", tmp_path), "host_memory": 1, "activation_memory": 0}
    with pytest.raises(BudgetTooSmall) as raised:
        run(kit, **smallest)
    smallest["host_memory"] = raised.value.needed_nbytes
    audit = Audit(monkeypatch)
    try:
        run(kit, **smallest)
    except Exception:
        assert audit.check()  # checksums may see it first
    assert any("lease had ended" in problem or "at once" in problem for problem in audit.check())


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("place", ["states", "fake nvme"])
def test_two_thousand_steps_leave_nothing_behind(place: str, tmp_path: Path) -> None:
    """Resident memory, descriptors and threads after 2000 steps are those after 200."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(4)), nn.Linear(32, 1))
    config = OffloadConfig(dtype=torch.float32, clip_grad_norm=1.0, **settings(place, tmp_path))

    def footprint() -> tuple[int, int, int]:
        gc.collect()
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return resident, len(os.listdir("/proc/self/fd")), threading.active_count()

    with OffloadEngine(model, AdamW(lr=1e-3), config) as engine:
        x = torch.randn(8, 32)
        seen = []
        for step in range(2000):
            engine.backward(engine(x).square().mean())
            engine.step()
            if step + 1 in (200, 2000):
                engine.flush()
                seen.append(footprint())
    (early, *counts), (late, *later) = seen
    assert later == counts
    assert late - early < 8 << 20, f"{late - early} bytes more after 1800 steps"
