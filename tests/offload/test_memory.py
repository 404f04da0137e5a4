"""Memory is a budget: what a process really has resident stays below it, whatever the number of layers.

Each figure comes from a process of its own. The model is a pile of L layers `x + relu(linear(x))` of width C = 1024,
one unit each: C*C + C parameters, which in bf16 rest in 12 B each (2 parameter + 2 low half + 8 moments) and have a
gradient of 2 B for the length of a step.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

MIB = 1 << 20
WIDTH = 1024
BATCH = 16
STATE_NBYTES_PER_LAYER = 12 * (WIDTH * WIDTH + WIDTH)

SCRIPT = """
import json, sys
import torch
from torch import nn

def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

torch.set_num_threads(1)
after_import = status("VmRSS")
from offload import AdamW, OffloadConfig, OffloadEngine

layers, width, batch, budget, steps, device = (int(a) if a.isdigit() else a for a in sys.argv[1:7])

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(width, width)
    def forward(self, x):
        return x + torch.relu(self.linear(x))

model = nn.Sequential(*(Layer() for _ in range(layers)))
settings = {"device_memory": 16 << 20} if device == "fake" else {}
engine = OffloadEngine(model, AdamW(lr=1e-3), OffloadConfig(
    device=device, nvme="store", host_memory=budget, **settings))
building_peak = status("VmHWM")  # since exec; getrusage would also count the process that was forked
with open("/proc/self/clear_refs", "w") as refs:
    refs.write("5")  # forget the peak of building the model: what follows is training alone
read = 0
for _ in range(steps):
    loss = engine(torch.ones(batch, width, dtype=torch.bfloat16)).float().square().mean()
    engine.backward(loss)
    del loss
    read += engine.step().nbytes["read"]
training_peak = status("VmHWM")
memory = engine.memory
engine.close()
print(json.dumps({
    "after_import": after_import, "training_peak": training_peak, "read": read,
    "peak": max(building_peak, training_peak),
    "host_peak": memory.host_peak_nbytes, "host_budget": memory.host_budget_nbytes,
    "boundaries": memory.boundaries_peak_nbytes, "temporaries": memory.temporaries_nbytes,
}))
"""


def measure(
    kit: SimpleNamespace, folder: Path, layers: int, budget_nbytes: int, steps: int = 2, device: str = "cpu"
) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    arguments = (layers, WIDTH, BATCH, budget_nbytes, steps, device)
    done = kit.run_script(folder, SCRIPT, *(str(argument) for argument in arguments))
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["host_budget"] == budget_nbytes
    assert figures["host_peak"] <= budget_nbytes
    return figures


@pytest.mark.parametrize("device", ["cpu", "fake"])
def test_states_of_six_budgets_fit(kit: SimpleNamespace, tmp_path: Path, device: str) -> None:
    layers = 24
    states_nbytes = layers * STATE_NBYTES_PER_LAYER
    budget_nbytes = states_nbytes // 6
    figures = measure(kit, tmp_path, layers, budget_nbytes, device=device)
    # Peak includes building the model in fp32, which is 4 B per parameter: a third of its states.
    assert figures["peak"] < budget_nbytes + figures["after_import"] + 300 * MIB
    # More than two budgets of states must come from the drive in every step, or the test would prove nothing.
    assert figures["read"] > 2 * 2 * budget_nbytes


def test_only_boundaries_grow_with_layers(kit: SimpleNamespace, tmp_path: Path) -> None:
    """L and 4L layers under one budget.

    Outside of the budget lie the inputs of the unit calls (B*C*2 B per layer in bf16), one unit's temporaries and the
    result. So from L = 6 to 4L = 24, 18 * 16 * 1024 * 2 B = 576 KiB are due. A leak of a layer's parameters or states
    would be 18 * 2 MiB = 36 MiB at least. 12 MiB are left for Python objects and what malloc does not give back.
    """
    budget_nbytes = 36 * MIB
    few = measure(kit, tmp_path / "few", 6, budget_nbytes, steps=3)
    many = measure(kit, tmp_path / "many", 24, budget_nbytes, steps=3)
    boundary_nbytes = BATCH * WIDTH * 2
    assert few["boundaries"] == 6 * boundary_nbytes
    assert many["boundaries"] == 24 * boundary_nbytes
    assert many["temporaries"] == few["temporaries"] < 8 * boundary_nbytes

    def outside(figures: dict[str, Any]) -> int:
        return figures["training_peak"] - figures["after_import"] - figures["host_peak"]

    assert outside(many) - outside(few) <= 18 * boundary_nbytes + 12 * MIB


@pytest.mark.slow
def test_states_of_six_budgets_fit_at_length(kit: SimpleNamespace, tmp_path: Path) -> None:
    """The same with 100 M parameters and ten steps: nothing creeps."""
    layers = 96
    budget_nbytes = layers * STATE_NBYTES_PER_LAYER // 6
    short = measure(kit, tmp_path / "short", layers, budget_nbytes, steps=2)
    long = measure(kit, tmp_path / "long", layers, budget_nbytes, steps=10)
    for figures in (short, long):
        assert figures["training_peak"] < budget_nbytes + figures["after_import"] + 300 * MIB
    assert long["training_peak"] <= short["training_peak"] + 16 * MIB
