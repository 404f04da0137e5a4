"""Calls that look harmless and would lose a gradient or a value: right as in torch, or refused in words."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offload import SGD, OffloadConfig, OffloadEngine

CONFIG: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}


class Scaled(nn.Module):
    """The parent uses a parameter of its own in an operation that saves the parameter itself."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((8,), 0.7))
        self.block = nn.Sequential(nn.Linear(8, 8), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return (self.block(x) * self.scale).square().sum() + (self.scale**2).sum()


@pytest.mark.parametrize("between", ["optimizer.zero_grad", "module.zero_grad", "no_grad forward"])
def test_gradients_dropped_between_forward_and_backward_leave_the_graph_alone(between: str) -> None:
    torch.manual_seed(0)
    plain = Scaled()
    wrapped = copy.deepcopy(plain)
    x = torch.randn(4, 8)
    plain(x).backward()
    with OffloadEngine(wrapped, SGD(lr=0.1), OffloadConfig(**CONFIG)) as engine:
        loss = engine(x)
        if between == "optimizer.zero_grad":
            engine.optimizer.zero_grad()
        elif between == "module.zero_grad":
            engine.module.zero_grad()
        else:
            with torch.no_grad():
                engine(x)
        engine.backward(loss)
        with engine.gather("*") as parameters:
            for name, parameter in plain.named_parameters():
                assert torch.equal(parameters[name].grad, parameter.grad), name
        assert not engine.step().skipped


class Outer(nn.Module):
    def __init__(self, block: nn.Module, make: Any) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.block = block
        self.make = make

    def forward(self, x: Tensor) -> Tensor:
        return self.block(*self.make(self.first(x))).sum()


class Bag(dict[str, Tensor]):
    """A dict that torch's tree does not open."""


class Slotted:
    """An object without a dict of attributes."""

    __slots__ = ("value",)

    def __init__(self, value: Tensor) -> None:
        self.value = value


class Opening(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4).requires_grad_(False)

    def forward(self, bag: Any) -> Tensor:
        return self.linear(bag["value"])


@pytest.mark.parametrize("wrap", [lambda h: Bag(value=h), lambda h: [Bag(value=h)], lambda h: {h}, Slotted], ids=str)
def test_a_gradient_hidden_in_an_object_is_refused(wrap: Any) -> None:
    model = Outer(Opening(), lambda hidden: (wrap(hidden),))
    with (
        OffloadEngine(model, SGD(lr=0.1), OffloadConfig(**CONFIG)) as engine,
        pytest.raises(TypeError, match="carries a tensor which needs a gradient"),
    ):
        engine(torch.ones(2, 4))


class Averaging(nn.Module):
    """Binds a new buffer instead of writing to the old one, and is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("average", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        self.average = 0.9 * self.average + 0.1 * y.detach().mean(0)
        return y + self.average


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Averaging()
        self.last = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.block(self.block(x))).square().mean()


def test_a_buffer_that_forward_binds_anew_ends_as_in_torch() -> None:
    torch.manual_seed(0)
    plain = Twice()
    wrapped = copy.deepcopy(plain)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    with OffloadEngine(wrapped, SGD(lr=0.1), OffloadConfig(**CONFIG)) as engine:
        for step in range(3):
            x = torch.randn(2, 4, generator=torch.Generator().manual_seed(step))
            loss = plain(x)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            mine = engine(x)
            engine.backward(mine)
            engine.step()
            assert float(mine) == pytest.approx(float(loss), rel=1e-6)
            torch.testing.assert_close(engine.module.block.average, plain.block.average, rtol=1e-6, atol=1e-8)
