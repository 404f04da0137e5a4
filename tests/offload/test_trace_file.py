"""`engine.trace(path)`: every step until it ends, as it was reported, and nothing when it is off."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from offload import SGD, EngineClosed, OffloadConfig, OffloadEngine
from offload.scheduler.chrome import read_trace
from offload.scheduler.trace import busy_s, moved_nbytes


def engine_of(tmp_path: Path) -> OffloadEngine:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    config = OffloadConfig(
        device="cpu", nvme=tmp_path / "nvme", host_memory="64MiB", homes={"states": "nvme"}, durability="none",
        dtype=torch.float32,
    )  # fmt: skip
    return OffloadEngine(model, SGD(lr=0.1, momentum=0.9), config)


def one_step(engine: OffloadEngine):
    engine.backward(engine(torch.ones(2, 8)).sum())
    return engine.step()


def test_steps_are_recorded_until_the_trace_ends(tmp_path: Path) -> None:
    with engine_of(tmp_path) as engine:
        one_step(engine)
        engine.trace(tmp_path / "a.json")
        infos = [one_step(engine) for _ in range(2)]
        engine.trace(None)
        one_step(engine)
        engine.trace(tmp_path / "b.json")
        last = one_step(engine)
    steps = read_trace(tmp_path / "a.json")
    assert [step.step for step in steps] == [2, 3]
    assert [step.step for step in read_trace(tmp_path / "b.json")] == [last.step] == [5]
    for step, info in zip(steps, infos, strict=True):
        assert step.end_s - step.start_s == pytest.approx(info.seconds, abs=1e-5)
        assert moved_nbytes(step.spans) == info.nbytes and info.nbytes["read"] > 0
        assert busy_s(step.spans) == pytest.approx(dict(info.busy_s), abs=1e-4)
    assert steps[0].end_s == pytest.approx(steps[1].start_s, abs=1e-5)


def test_a_closed_engine_and_a_bad_path_are_refused(tmp_path: Path) -> None:
    engine = engine_of(tmp_path)
    with pytest.raises(FileNotFoundError):
        engine.trace(tmp_path / "missing" / "t.json")
    one_step(engine)
    engine.close()
    with pytest.raises(EngineClosed):
        engine.trace(tmp_path / "t.json")
