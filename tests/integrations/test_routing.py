"""A module whose own calls go through its engine: same class to whoever asks, the engine's numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offload import SGD, OffloadConfig, OffloadEngine
from offload.integrations.routing import route_calls, unroute_calls


class Recursive(nn.Module):
    """Calls itself once, deeper."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))

    def forward(self, x: Tensor, depth: int = 1) -> Tensor:
        x = self.layers(x)
        return self(x, depth - 1) if depth else x


@pytest.fixture
def engine() -> Iterator[OffloadEngine]:
    with OffloadEngine(Recursive(), SGD(lr=0.1), OffloadConfig(dtype=torch.float32, host_memory="4MiB")) as engine:
        route_calls(engine)
        yield engine


def test_a_call_of_the_module_is_one_of_the_engine(engine: OffloadEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    module, calls, hooks = engine.module, [], []
    inner = OffloadEngine.__call__

    def counted(self: OffloadEngine, *args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return inner(self, *args, **kwargs)

    monkeypatch.setattr(OffloadEngine, "__call__", counted)
    handle = module.register_forward_hook(lambda module, args, result: hooks.append(len(args)))
    x = torch.ones(2, 8)
    expected = Recursive()(x)
    assert torch.equal(module(x), expected)
    assert len(calls) == 1
    assert len(hooks) == 2  # the call, and the one that the module makes of itself
    handle.remove()
    assert torch.equal(engine(x), expected)


def test_it_trains(engine: OffloadEngine) -> None:
    plain = Recursive()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    x = torch.ones(2, 8)
    for _ in range(2):
        optimizer.zero_grad()
        plain(x).sum().backward()
        optimizer.step()
        engine.module(x).sum().backward()
        engine.step()
    ours = engine.state_dict()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-6)


def test_the_class_is_the_same_to_whoever_asks_and_comes_back(engine: OffloadEngine) -> None:
    module = engine.module
    assert isinstance(module, Recursive)
    assert (type(module).__name__, type(module).__module__) == ("Recursive", Recursive.__module__)
    assert type(module) is not Recursive
    unroute_calls(module)
    assert type(module) is Recursive
    unroute_calls(module)
    assert type(module) is Recursive


def test_a_call_that_fails_leaves_the_next_one_whole(engine: OffloadEngine) -> None:
    module = engine.module
    with pytest.raises(RuntimeError):
        module(torch.ones(2, 3))
    x = torch.ones(2, 8)
    assert torch.equal(module(x), Recursive()(x))
