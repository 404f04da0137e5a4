"""Ctrl-C and errors between the last backward and a made step: whoever goes on gets the numbers as if nothing was."""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offload import AdamW, OffloadConfig, OffloadEngine
from offload.gradients import Gradients
from offload.residency import Residency

SPEC = AdamW(lr=1e-2)


class Stack(nn.Module):
    """Linear layers in a row; `between` is called on what the last but one gives."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.between: Callable[[Tensor], Tensor] = lambda x: x

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.layers[1](torch.tanh(self.layers[0](x))))
        return torch.tanh(self.layers[2](self.between(x)))


class Broken(torch.autograd.Function):
    """Raises in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise ZeroDivisionError


def open_engine(folder: Path, update: str) -> OffloadEngine:
    homes = {"param": "nvme", "states": "nvme", "grad": "nvme"}
    config = OffloadConfig(
        nvme=folder, homes=homes, update=update, device="cpu", dtype=torch.float32, host_memory="64MiB"
    )
    return OffloadEngine(Stack(), SPEC, config)


def loss_of(call: Callable[[Tensor], Tensor]) -> Tensor:
    return call(torch.randn(4, 8, generator=torch.Generator().manual_seed(1))).square().mean()


def plain(steps: int) -> tuple[dict[str, Tensor], float]:
    """Values after `steps` steps of the same batch, and the norm of the last step's gradients."""
    model = Stack()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    norm = 0.0
    for _ in range(steps):
        loss_of(model).backward()
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), 1e9))
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict(), norm


def assert_values(engine: OffloadEngine, steps: int) -> None:
    found, expected = engine.state_dict(), plain(steps)[0]
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7, msg=name)


def interrupt(*args: Any, **kwargs: Any) -> None:
    raise KeyboardInterrupt


@pytest.fixture
def slow_landings(monkeypatch: pytest.MonkeyPatch) -> None:
    add = Gradients._add

    def slow(*args: Any) -> None:
        time.sleep(0.1)
        add(*args)

    monkeypatch.setattr(Gradients, "_add", slow)


@pytest.mark.usefixtures("slow_landings")
@pytest.mark.parametrize("update", ["next_forward", "speculative"])
def test_a_wait_for_gradients_that_was_interrupted_is_made_again(
    update: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_engine(tmp_path, update) as engine:
        engine.backward(loss_of(engine))
        with monkeypatch.context() as patch:
            patch.setattr(concurrent.futures, "wait", interrupt)
            with pytest.raises(KeyboardInterrupt):
                engine.step()
        assert engine.step().grad_norm == pytest.approx(plain(1)[1], rel=1e-5)
        assert_values(engine, 1)


@pytest.mark.parametrize("then", ["step", "zero_grad"])
def test_what_began_in_backward_can_be_taken_back_until_the_step_is_made(
    then: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_engine(tmp_path, "speculative") as engine:
        engine.backward(loss_of(engine))
        engine._gradients.wait()
        with monkeypatch.context() as patch:
            patch.setattr(Residency, "settle", interrupt)
            with pytest.raises(KeyboardInterrupt):
                engine.step()
        if then == "step":
            engine.step()
        else:
            engine.optimizer.zero_grad()
        assert_values(engine, 1 if then == "step" else 0)


@pytest.mark.usefixtures("slow_landings")
def test_values_are_looked_at_when_nothing_can_begin_any_more(tmp_path: Path) -> None:
    """Behind a backward that raised, the gradients that it sent may still complete units and so begin updates."""
    with open_engine(tmp_path, "speculative") as engine:
        engine.module.between = Broken.apply
        with pytest.raises(ZeroDivisionError):
            engine.backward(loss_of(engine))
        assert_values(engine, 0)
        engine._gradients.wait()
        assert engine._early is not None and not engine._early.has_begun
