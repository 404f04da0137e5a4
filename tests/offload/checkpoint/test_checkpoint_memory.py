"""Saving and resuming a model of four times the host budget takes the budget and a constant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HEAD = '''
import gc, json, sys
from pathlib import Path
import torch
from torch import nn
from offload import SGD, AdamW, OffloadConfig, OffloadEngine

def rss(field):
    for line in open("/proc/self/status"):
        if line.startswith(field):
            return int(line.split()[1]) << 10

def peak_of(work):
    """Bytes by which the peak of resident memory, mapped files included, lies over what is resident before."""
    gc.collect()
    before = rss("VmRSS:")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    work()
    return rss("VmHWM:") - before

torch.set_num_threads(1)
folder = Path(sys.argv[1])
'''

MANY_UNITS = (
    HEAD
    + """
model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(48)))
model[3].requires_grad_(False)
weights = sum(p.nbytes for p in model.parameters())
config = OffloadConfig(nvme=folder / "nvme", host_memory="48MiB", dtype=torch.float32, device="cpu", durability="none")
with OffloadEngine(model, AdamW(lr=1e-3), config) as engine:
    def step():
        engine.backward(engine(torch.randn(2, 1024)).square().mean())
        engine.step()
    step(); step()
    found = {"weights": weights, "nothing": peak_of(step)}
    found["save"] = peak_of(lambda: engine.save(folder / "run"))
    def both():
        engine.save(folder / "run", background=True)
        step()
        engine._checkpoints.wait()
    found["background"] = peak_of(both)
    found["resume"] = peak_of(lambda: engine.resume(folder / "run"))
    found["resident"] = rss("VmRSS:")
print(json.dumps(found))
"""
)

ONE_LARGE = (
    HEAD
    + """
model = nn.Sequential(nn.Embedding(20480, 1024), nn.Embedding(20480, 1024), nn.Linear(1024, 8))
model[1].requires_grad_(False)
model.forward = lambda index: model[2](model[0](index) + model[1](index))
largest = model[0].weight.nbytes
config = OffloadConfig(
    nvme=folder / "nvme", host_memory="256MiB", dtype=torch.bfloat16, device="cpu", durability="none"
)
with OffloadEngine(model, SGD(lr=0.1, momentum=0.9), config) as engine:
    for _ in range(2):
        engine.backward(engine(torch.arange(4)).float().square().mean())
        engine.step()
    found = {"largest": largest}
    found["save"] = peak_of(lambda: engine.save(folder / "run"))
    found["without frozen"] = peak_of(lambda: engine.save(folder / "trainable", frozen=False))
print(json.dumps(found))
"""
)


def test_peak_memory(kit: Any, tmp_path: Path) -> None:
    """48 units of 4 MiB of weights and 8 MiB of moments. What a save or a resume holds beside the pools of the budget,
    which are resident already: a window of copies (24 MiB), a window of mapped files, and small change."""
    done = kit.run_script(tmp_path, MANY_UNITS, str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["weights"] >= 4 * (48 << 20) - (1 << 20)
    for what in ("save", "background", "resume"):
        assert found[what] <= 64 << 20, found


def test_peak_memory_of_a_large_parameter(kit: Any, tmp_path: Path) -> None:
    """One of 80 MiB in fp32, with as much of momentum, is copied in windows of 24 MiB, and so are frozen ones."""
    done = kit.run_script(tmp_path, ONE_LARGE, str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["largest"] == 80 << 20
    for what in ("save", "without frozen"):
        assert found[what] <= 36 << 20, found
