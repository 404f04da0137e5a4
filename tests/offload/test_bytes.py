"""Bytes that a step moves over the drive, counted by the operating system and by the engine: the placement's table.

The model is a pile of L layers `x + relu(linear(x))` of width 512, one unit each, in bf16 with a split master: a
parameter is 2 B, its states are 2 (low half) + 8 (moments). Expected per parameter and step:

    Sh, states on the drive: read 10, written 10; where each step is durable 12, for the parameter in DRAM is copied
    S, parameters there too: read 2 for backward, 2 for forward and the update at once, 10; written 10 + 2

Source: ZeRO-Infinity (Rajbhandari et al. 2021, section 4.1) counts the same 12 bytes of states.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from offload import AdamW, BudgetTooSmall, OffloadConfig, OffloadEngine

WIDTH, DEPTH = 512, 6
HOMES = {
    "Sh": {"param": "host", "states": "nvme", "grad": "host"},
    "S": {"param": "nvme", "states": "nvme", "grad": "host"},
}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.linear(x))


def drive_nbytes() -> tuple[int, int]:
    """Bytes that this process has caused to be (read, written) on block devices so far."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"]), int(fields["write_bytes"])


def system_counts(folder: Path) -> bool:
    """Whether the operating system counts direct writes into `folder` (it does not in memory file systems)."""
    page = mmap.mmap(-1, 1 << 20)
    before = drive_nbytes()[1]
    try:
        file = os.open(folder / "counted", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    except OSError:
        return False
    try:
        os.write(file, page)
    finally:
        os.close(file)
    return drive_nbytes()[1] - before >= 1 << 20


def smallest(folder: Path, homes: dict[str, str], micro_batches: int, durability: str, update: str) -> OffloadEngine:
    """An engine with the smallest budget, hence the smallest window, that the placement runs in."""
    settings = {"homes": homes, "micro_batches": micro_batches, "durability": durability, "update": update}
    budget = 1
    while True:
        model = nn.Sequential(*(Layer() for _ in range(DEPTH)))
        config = OffloadConfig(device="cpu", nvme=folder, host_memory=budget, activation_memory=0, **settings)  # type: ignore[arg-type]
        try:
            return OffloadEngine(model, AdamW(lr=1e-3), config)
        except BudgetTooSmall as failure:
            budget = failure.needed_nbytes


def per_parameter(engine: OffloadEngine, micro_batches: int, steps: int) -> tuple[list[float], list[float]]:
    """([read, written] as the system counts, [read, written] as the engine counts) per parameter and step."""

    def step() -> dict[str, int]:
        batches = [torch.ones(4, WIDTH, dtype=torch.bfloat16) for _ in range(micro_batches)]
        return dict(engine.train_step(batches, loss_fn=lambda y, _: y.float().square().mean()).nbytes)

    for _ in range(2):
        step()
    engine.flush()
    engine.module(torch.ones(4, WIDTH, dtype=torch.bfloat16))  # every pending update is made and written
    engine.flush()
    before = drive_nbytes()
    counted = [step() for _ in range(steps)]
    numel = sum(p.numel() for p in engine.module.parameters()) * steps
    engine.flush()
    after = drive_nbytes()
    return (
        [(after[i] - before[i]) / numel for i in (0, 1)],
        [sum(one[lane] for one in counted) / numel for lane in ("read", "write")],
    )


@pytest.mark.parametrize(
    ("form", "durability", "expected"),
    [("Sh", "none", (10, 10)), ("Sh", "step", (10, 12)), ("S", "none", (14, 12)), ("S", "step", (14, 12))],
)
def test_a_step_moves_the_bytes_of_its_placement(
    tmp_path: Path, form: str, durability: str, expected: tuple[float, float]
) -> None:
    if not system_counts(tmp_path):
        pytest.skip("LOUD: the file system of the test folder does not count direct I/O, so nothing can be compared")
    with smallest(tmp_path / "store", HOMES[form], 1, durability, "next_forward") as engine:
        system, own = per_parameter(engine, 1, 6)
    print(form, durability, system, own)
    assert system == pytest.approx(expected, rel=0.03)
    assert own == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("form", ["Sh", "S"])
def test_micro_batches_that_take_turns_move_no_byte_more(tmp_path: Path, form: str) -> None:
    if not system_counts(tmp_path):
        pytest.skip("LOUD: the file system of the test folder does not count direct I/O, so nothing can be compared")
    counted = []
    for micro_batches in (1, 2, 4):
        with smallest(tmp_path / f"{micro_batches}", HOMES[form], micro_batches, "none", "next_forward") as engine:
            counted.append(per_parameter(engine, micro_batches, 6)[0])
    print(form, counted)
    assert counted[1] == pytest.approx(counted[0], rel=0.03)
    assert counted[2] == pytest.approx(counted[0], rel=0.03)
