"""What forwards leave in lists, dicts and attributes between calls, step after step and with micro-batches in turns."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offload import SGD, OffloadConfig, OffloadEngine

WIDTH = 8


class Block(nn.Module):
    """Leaves an auxiliary loss: in a list or dict that the whole model shares, or in a list of its own."""

    def __init__(self, kind: str, shared: Any) -> None:
        super().__init__()
        self.kind = kind
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.__dict__["shared"] = shared
        self.own: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.linear(x))
        auxiliary = y.square().mean()
        if self.kind == "list":
            self.shared.append(auxiliary)
        elif self.kind == "dict":
            self.shared["sum"] = self.shared.get("sum", 0) + auxiliary
        elif self.kind == "own list":
            self.own.clear()
            self.own.append(auxiliary)
        else:
            self.own = [auxiliary]
        return x + y


class Model(nn.Module):
    def __init__(self, kind: str, emptied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.emptied = kind, emptied
        self.shared: Any = {} if kind == "dict" else []
        self.blocks = nn.ModuleList(Block(kind, self.shared) for _ in range(3))
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        self.shared.clear()
        for block in self.blocks:
            x = block(x)
        loss = self.head(x).square().mean()
        if self.kind == "list":
            loss = loss + sum(self.shared)
        elif self.kind == "dict":
            loss = loss + self.shared["sum"]
        else:
            loss = loss + sum(block.own[0] for block in self.blocks)
        if self.emptied:
            self.shared.clear()
        return loss


def batches() -> list[list[Tensor]]:
    draws = torch.Generator().manual_seed(1)
    return [[torch.randn(4, WIDTH, generator=draws) * (1 + number) for number in range(3)] for _ in range(3)]


def of_plain_torch(model: nn.Module) -> dict[str, Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in batches():
        for x in step:
            (model(x) / 3).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("kind", ["list", "dict", "own list", "new list"])
@pytest.mark.parametrize("emptied", [False, True])
@pytest.mark.parametrize("activation_memory", [0, "auto"])
@pytest.mark.parametrize("in_turns", [False, True])
def test_auxiliary_losses_in_lists_are_those_of_plain_torch(
    kind: str, emptied: bool, activation_memory: Any, in_turns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """In turns one micro-batch would find in a shared list what another has put there: they go one by one instead."""
    expected = of_plain_torch(Model(kind, emptied))
    config = OffloadConfig(
        device="cpu",
        dtype=torch.float32,
        host_memory="64MiB",
        micro_batches=3,
        activation_memory=activation_memory,
    )
    caplog.set_level(logging.WARNING, "offload")
    with OffloadEngine(Model(kind, emptied), SGD(lr=0.1), config) as engine:
        for step in batches():
            if in_turns:
                engine.train_step(step)
            else:
                for x in step:
                    engine.backward(engine(x) / 3)
                engine.step()
        found = engine.state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)
    if in_turns and kind in ("list", "dict"):
        assert "tensors a list or dict among the modules' attributes" in caplog.text


class Conditioned(nn.Module):
    """The parent puts a tensor with a graph into a plain attribute of the unit."""

    def __init__(self) -> None:
        super().__init__()
        self.condition = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList([Reader(), Reader()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            block.given = self.condition(x)
            x = block(x)
        return x.square().mean()


class Reader(nn.Module):
    given: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.given


def test_a_graph_in_a_plain_attribute_is_refused_where_it_would_go_round_for_ever() -> None:
    config = OffloadConfig(device="cpu", dtype=torch.float32, host_memory="64MiB", activation_memory=0)
    with OffloadEngine(Conditioned(), SGD(lr=0.1), config) as engine:
        loss = engine(torch.ones(2, WIDTH))
        with pytest.raises(RuntimeError, match=r"came back to the same call.*pass it as an argument"):
            engine.backward(loss)


def test_a_parameter_that_another_engine_has_is_refused() -> None:
    """Its values live there: a second engine would take the placeholder for them."""
    first, second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
    second.weight = first.weight
    config = OffloadConfig(device="cpu", host_memory="64MiB", dtype=torch.float32)
    with OffloadEngine(nn.Sequential(first), SGD(), config) as engine:
        with pytest.raises(ValueError, match=r"or a parameter of it, has been wrapped by an engine"):
            OffloadEngine(nn.Sequential(second), SGD(), config)
        engine.backward(engine(torch.ones(2, WIDTH)).sum())
        assert not engine.step().skipped


def test_a_backward_inside_averaged_weights_is_refused() -> None:
    config = OffloadConfig(device="cpu", host_memory="64MiB", dtype=torch.float32, ema_decay=0.5)
    with OffloadEngine(nn.Sequential(nn.Linear(WIDTH, WIDTH)), SGD(), config) as engine:
        engine.backward(engine(torch.ones(2, WIDTH)).sum())
        engine.step()
        with engine.averaged_weights():
            loss = engine(torch.ones(2, WIDTH)).sum()
            with pytest.raises(RuntimeError, match=r"inside averaged_weights\(\)"):
                loss.backward()
        engine.backward(engine(torch.ones(2, WIDTH)).sum())
        assert not engine.step().skipped
