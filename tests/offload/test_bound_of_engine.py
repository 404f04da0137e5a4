"""`StepInfo.bound_s`: the rig's figures and the placement's bytes, with the step's own compute."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from offload import AdamW, OffloadConfig, OffloadEngine
from offload.scheduler.rig import Rig

RIG = """
name = "slow drive"
[drive]
read_gb_s = 0.001
write_gb_s = 0.002
law = "duplex"
latency_s = 0.0
depth = 8
[cores]
count = 1
update_elements_s = 1e12
dram_gb_s = 1e6
[compute]
flop_s = 1e12
[sizes]
host = 1000000000
nvme = 1000000000
"""


def test_a_step_is_reported_beside_its_bound(tmp_path: Path) -> None:
    """States on a drive of 1 MB/s read: with clipping all of them move in forward, behind the reads."""
    (tmp_path / "rig.toml").write_text(RIG)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    config = OffloadConfig(
        device="cpu", dtype=torch.float32, host_memory="16MiB", nvme=tmp_path / "run", durability="none",
        homes={"param": "host", "grad": "host", "states": "nvme"}, clip_grad_norm=1.0, rig=tmp_path / "rig.toml",
        update="next_forward",
    )  # fmt: skip
    with OffloadEngine(model, AdamW(), config) as engine:
        for _ in range(3):
            engine.backward(engine(torch.ones(2, 64)).square().mean())
            info = engine.step()
        read_s = sum(layout.nbytes("states") for layout in engine._parts.layouts) / 1e6
    assert info.bound_s is not None and info.bound_ratio is not None
    backward_s = info.bound_s - read_s
    assert 0 < backward_s < info.busy_s["compute"] + 1e-3
    assert info.bound_ratio == pytest.approx(info.seconds / info.bound_s)


def test_without_a_rig_there_is_no_bound() -> None:
    config = OffloadConfig(device="cpu", dtype=torch.float32, host_memory="16MiB")
    with OffloadEngine(nn.Linear(4, 4), AdamW(), config) as engine:
        engine.backward(engine(torch.ones(2, 4)).sum())
        info = engine.step()
    assert info.bound_s is None and info.bound_ratio is None


def test_a_rig_is_read_as_written() -> None:
    assert Rig.from_toml(RIG).drive.read_gb_s == 0.001
    with pytest.raises(ValueError, match="read_gb_s"):
        Rig.from_toml(RIG.replace("read_gb_s = 0.001", "read_gb_s = -1.0"))


def test_a_rig_that_cannot_be_read_leaves_no_thread_behind(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    module = nn.Linear(4, 4)
    with pytest.raises(FileNotFoundError):
        OffloadEngine(module, AdamW(lr=1e-3), OffloadConfig(device="cpu", rig=tmp_path / "none.toml"))
    assert set(threading.enumerate()) <= before
    assert not module.weight.isnan().any()
