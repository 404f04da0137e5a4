"""A smaller budget may cut a block into finer units, and changes no bit by it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offload import AdamW, BudgetTooSmall, OffloadConfig, OffloadEngine


class Block(nn.Module):
    """Calls a child twice and reads its weight besides, so that a weight has three uses in one backward."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(24, 48)
        self.b = nn.Linear(48, 24)
        self.n = nn.LayerNorm(24)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.linear(F.relu(self.a(x)), self.a.weight.t()) + self.b(F.gelu(self.a(self.n(x))))


def norm(folder: Path, host_memory: str | int, turns: bool) -> tuple[float, int]:
    """Gradient norm of a step of two bf16 micro-batches, and the number of units."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(4)))
    config = OffloadConfig(
        nvme=folder, homes={"states": "nvme", "grad": "nvme", "param": "host"}, device="cpu", host_memory=host_memory,
        micro_batches=2, update="step", activation_memory=0,
    )  # fmt: skip
    batches = [torch.randn(18, 24, generator=torch.Generator().manual_seed(n)).bfloat16() for n in range(2)]
    with OffloadEngine(model, AdamW(lr=1e-2), config) as engine:
        units = len(engine._parts.layouts)
        if turns:
            return engine.train_step(batches, lambda out, _: out.float().square().mean(), "sum").grad_norm, units
        for x in batches:
            engine.backward(engine(x).float().square().mean())
        return engine.step().grad_norm, units


def test_bits_do_not_depend_on_how_a_budget_cuts_units(tmp_path: Path) -> None:
    with pytest.raises(BudgetTooSmall) as refusal:
        norm(tmp_path / "probe", "1KiB", turns=False)
    smallest = refusal.value.needed_nbytes
    whole, few = norm(tmp_path / "large", "64MiB", turns=False)
    cut, many = norm(tmp_path / "small", smallest, turns=False)
    assert many > few
    assert cut == whole
    assert norm(tmp_path / "turns", "64MiB", turns=True)[0] == whole
    assert norm(tmp_path / "small turns", smallest, turns=True)[0] == whole
