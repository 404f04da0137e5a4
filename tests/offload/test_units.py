"""Which modules are units: the automatic choice, the user's own, and experts that a step leaves idle."""

from __future__ import annotations

import copy
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offload import AdamW, BudgetTooSmall, OffloadConfig, OffloadEngine

WIDTH = 16


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))


class Experts(nn.Module):
    """Four experts, of which a step calls those that `calls` names; the others are left out, or called with no rows."""

    def __init__(self, empty_calls: bool) -> None:
        super().__init__()
        self.empty_calls = empty_calls
        self.norm = nn.LayerNorm(WIDTH)
        self.experts = nn.ModuleList(mlp() for _ in range(4))

    def forward(self, x: Tensor, calls: tuple[int, ...]) -> Tensor:
        y = self.norm(x)
        for number, expert in enumerate(self.experts):
            if number in calls:
                x = x + expert(y)
            elif self.empty_calls:
                x = x.index_add(0, torch.empty(0, dtype=torch.long), expert(y[:0]))
        return x


class Mixture(nn.Module):
    def __init__(self, empty_calls: bool = False) -> None:
        super().__init__()
        self.embed = nn.Linear(8, WIDTH)
        self.blocks = nn.ModuleList(Experts(empty_calls) for _ in range(2))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, calls: tuple[int, ...]) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, calls)
        loss: Tensor = self.head(x).square().mean()
        return loss


def unit_names(engine: OffloadEngine) -> list[str]:
    """The first column of the table that `print(engine)` shows."""
    lines = str(engine).splitlines()
    last = next(n for n, line in enumerate(lines) if line.startswith("host memory:"))
    return [line.split()[0] for line in lines[1:last]]


def names_with(model: nn.Module, **settings: Any) -> list[str]:
    config = OffloadConfig(device="cpu", dtype=torch.float32, **settings)
    with OffloadEngine(model, AdamW(), config) as engine:
        return unit_names(engine)


def test_blocks_are_whole_by_choice() -> None:
    assert names_with(Mixture()) == ["embed", "blocks.0", "blocks.1", "head"]


EXPERTS = [f"blocks.{b}.{part}" for b in range(2) for part in ["norm", *(f"experts.{e}" for e in range(4))]]


@pytest.mark.parametrize("entry", ["blocks.*.experts.*", "*experts.?", nn.Sequential], ids=str)
def test_units_chosen_by_name_or_class(entry: Any) -> None:
    assert names_with(Mixture(), units=[entry]) == ["embed", *EXPERTS, "head"]


def test_the_outermost_choice_wins_and_is_never_cut(kit: SimpleNamespace, tmp_path: Any) -> None:
    settings = {"nvme": tmp_path / "nvme", "homes": kit.ALL_NVME, "overwrite": True}
    cut = kit.smallest_budget(lambda budget: names_with(Mixture(), host_memory=budget, **settings))
    assert len(names_with(Mixture(), host_memory=cut, **settings)) > 4
    units = [Experts, "*.norm"]
    with pytest.raises(BudgetTooSmall):
        names_with(Mixture(), host_memory=cut, units=units, **settings)
    whole = kit.smallest_budget(lambda budget: names_with(Mixture(), host_memory=budget, units=units, **settings))
    assert names_with(Mixture(), host_memory=whole, units=units, **settings) == [
        "embed",
        "blocks.0",
        "blocks.1",
        "head",
    ]


def test_a_trunk_can_be_one_unit() -> None:
    model = nn.ModuleDict({"first": nn.Linear(8, 8), "trunk": Mixture()})
    assert names_with(copy.deepcopy(model)) == ["first", *(f"trunk.{n}" for n in names_with(Mixture()))]
    assert names_with(model, units=[Mixture]) == ["first", "trunk"]


@pytest.mark.parametrize(
    ("units", "complaint"),
    [
        (["blocks.*.router"], "pattern 'blocks.*.router' fits no module that can be a unit; names look like 'embed'"),
        ([nn.Conv2d], "class Conv2d fits no module that can be a unit"),
        (["blocks"], "'blocks' is a list, which nobody calls: give 'blocks.*'"),
        ("blocks.*", "units='blocks.*'; give a list"),
        ([3], "give a list of module classes and patterns"),
    ],
)
def test_a_choice_that_cannot_be_is_refused(units: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=re.escape(complaint)):
        names_with(Mixture(), units=units)


@pytest.mark.parametrize("empty_calls", [False, True], ids=["left out", "called with no rows"])
@pytest.mark.parametrize("units", [(), ["*experts.?"]], ids=["blocks", "experts"])
def test_idle_experts_get_what_torch_gives_them(
    kit: SimpleNamespace, settings: dict[str, Any], units: Any, empty_calls: bool
) -> None:
    """Without a gradient they are untouched; with one of zeros they decay."""
    torch.manual_seed(0)
    plain = Mixture(empty_calls)
    wrapped = copy.deepcopy(plain)
    start = copy.deepcopy(plain).state_dict()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=0.1)
    config = OffloadConfig(dtype=torch.float32, units=units, **settings)
    with OffloadEngine(wrapped, AdamW(lr=0.01, weight_decay=0.1), config) as engine:
        for calls in [(0, 1), (1, 2), (1,)]:
            x = torch.randn(5, 8)
            plain(x, calls).backward()
            engine.backward(engine(x, calls))
            with engine.gather("*") as parameters:
                for name, parameter in plain.named_parameters():
                    ours = parameters[name].grad
                    assert (ours is None) == (parameter.grad is None), name
                    if ours is not None and parameter.grad is not None:
                        torch.testing.assert_close(ours, parameter.grad, rtol=1e-4, atol=1e-6)
            optimizer.step()
            optimizer.zero_grad()
            engine.step()
        weights = engine.state_dict()
    assert kit.relative_difference(weights, plain.state_dict(), start) <= 1e-3
    idle = "blocks.0.experts.3.0.weight"
    assert torch.equal(weights[idle], start[idle]) == (not empty_calls)
