"""Ctrl-C anywhere in a call of a unit, and failures in backward: afterwards the numbers are those of plain torch."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offload import SGD, OffloadConfig, OffloadEngine
from offload.bindings import Bindings
from offload.runtime import CallRuntime


class Net(nn.Module):
    """Three units; the first and the last share a weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 4)
        self.middle = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.last = nn.Linear(4, 4)
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x)))


X = torch.linspace(-1, 1, 8).reshape(2, 4)


class InterruptAtLine:
    """Raises KeyboardInterrupt at the n-th line that is run in one of `codes` of `function` objects."""

    def __init__(self, functions: list[Any], number: int) -> None:
        self.codes = {function.__code__ for function in functions}
        self.number = number
        self.reached = False

    def trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code not in self.codes:
            return None
        if event == "line":
            self.number -= 1
            if not self.number:
                self.reached = True
                raise KeyboardInterrupt
        return self.trace

    def __enter__(self) -> InterruptAtLine:
        self.before = sys.gettrace()
        sys.settrace(self.trace)
        return self

    def __exit__(self, *error: object) -> None:
        sys.settrace(self.before)


def values_after(steps: int) -> dict[str, Tensor]:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        model(X).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


LINES = {
    "values": [Bindings.bind, Bindings.unbind, CallRuntime.hold.__wrapped__],
    "passes": [CallRuntime.forward_pass.__wrapped__],
}


@pytest.mark.parametrize(
    ("phase", "mend", "where"),
    [
        ("forward", "zero_grad", "values"),
        ("forward", "next forward", "values"),
        ("backward", "zero_grad", "values"),
        ("forward", "next forward", "passes"),
    ],
)
def test_interrupted_at_every_line(phase: str, mend: str, where: str) -> None:
    """Of what shows and hides values, and counts passes. Whoever goes on computes with the values of now."""
    number, reached = 1, True
    while reached and number < 400:
        with OffloadEngine(Net(), SGD(lr=0.1), OffloadConfig(device="cpu", dtype=torch.float32)) as engine:
            loss = engine(X).square().sum() if phase == "backward" else None
            with InterruptAtLine(LINES[where], number) as interrupt:
                try:
                    engine(X) if loss is None else engine.backward(loss)
                except KeyboardInterrupt:
                    pass
            reached = interrupt.reached
            del loss
            if mend == "zero_grad":
                engine.optimizer.zero_grad()
            for _ in range(2):
                engine.backward(engine(X).square().sum())
                engine.step()
            assert not engine._runtime.computing
            for name, value in values_after(2).items():
                torch.testing.assert_close(engine.state_dict()[name], value, msg=f"{name}, line {number}")
            for parameter in engine.module.parameters():
                assert parameter.isnan().all(), f"values of a slot show on after line {number}"
        number += 7 if number > 40 else 1
    assert number > (5 if where == "passes" else 40)


def test_zero_grad_after_a_failed_backward_that_updates_on_the_way(caplog: pytest.LogCaptureFixture) -> None:
    """Without a store there is no way back: what was updated stays, as with optimizers that step in hooks."""
    config = OffloadConfig(device="cpu", dtype=torch.float32, update="backward")
    model = Net()
    model.last.weight = nn.Parameter(model.last.weight.detach().clone())
    plain = Net()
    plain.last.weight = nn.Parameter(plain.last.weight.detach().clone())
    with OffloadEngine(model, SGD(lr=0.1, momentum=0.9), config) as engine:
        handle = model.first.bias.register_hook(lambda gradient: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.backward(engine(X).square().sum())
        handle.remove()
        engine.optimizer.zero_grad()
        assert "'last'" in caplog.text and "keep their update" in caplog.text
        optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
        plain(X).square().sum().backward()
        kept = [name for name in ("first", "middle", "last") if repr(name) in caplog.text]
        for name, parameter in plain.named_parameters():
            if name.split(".")[0] not in kept:
                parameter.grad = None
        optimizer.step()
        optimizer.zero_grad()
        for _ in range(2):
            plain(X).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            engine.backward(engine(X).square().sum())
            engine.step()
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(engine.state_dict()[name], value, msg=name)
        with engine.gather("*") as parameters:
            assert {n.split(".")[0]: host.step for n, host in parameters.items()} == {
                name: 3 if name in kept else 2 for name in ("first", "middle", "last")
            }
