"""Lists, dicts and objects that a unit is given and fills: key/value caches, collected losses."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offload import SGD, OffloadConfig, OffloadEngine


def noise(step: int) -> Tensor:
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(step))


@dataclass
class Layer:
    """One layer's part of a cache. `seen` counts rows."""

    keys: Tensor | None = None
    seen: int = 0


@dataclass
class Cache:
    layers: list[Layer] = field(default_factory=list)


class Attending(nn.Module):
    """Adds a layer to the cache, or appends to the one that is there, and attends to all that the cache holds."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.key = nn.Linear(8, 8)
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        if len(cache.layers) <= self.number:
            cache.layers.append(Layer())
        layer = cache.layers[self.number]
        keys = self.key(x)
        layer.keys = keys if layer.keys is None else torch.cat([layer.keys, keys])
        layer.seen += len(x)
        assert layer.seen == len(layer.keys)
        earlier = cache.layers[0].keys
        assert earlier is not None
        return x + self.out(torch.softmax(x @ layer.keys.T, -1) @ layer.keys) + earlier.mean(0)


class Collecting(nn.Module):
    """Leaves a loss in a list that it is given, in a dict, and in a list of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor, losses: list[Tensor], named: dict[str, Any]) -> Tensor:
        y = torch.tanh(self.linear(x))
        losses.append(y.square().mean())
        named["last"] = (y.mean(), len(losses))
        self.kept.append(y.abs().mean())
        return x + y


class Model(nn.Module):
    def __init__(self, block: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(block(n) for n in range(3))
        self.last = nn.Linear(8, 8)


class WithCache(Model):
    """Runs two chunks of a sequence through one cache; the loss looks into the cache as well."""

    def __init__(self) -> None:
        super().__init__(Attending)

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        for chunk in (x[:2], x[2:]):
            chunk = self.first(chunk)
            for block in self.blocks:
                chunk = block(chunk, cache=cache)
        assert cache.layers[1].keys is not None
        return self.last(chunk).square().mean() + cache.layers[1].keys.square().mean()


class WithLists(Model):
    def __init__(self) -> None:
        super().__init__(lambda number: Collecting())

    def forward(self, x: Tensor) -> Tensor:
        losses: list[Tensor] = []
        named: dict[str, Any] = {}
        x = self.first(x)
        for block in self.blocks:
            block.kept = []
            x = block(x, losses, named)
        assert len(losses) == 3
        kept = torch.stack([value for block in self.blocks for value in block.kept])
        assert len(kept) == 3
        return (
            self.last(x).square().mean() + torch.stack(losses).sum() + named["last"][0] * named["last"][1] + kept.sum()
        )


@pytest.mark.parametrize("activation_memory", [0, "1MiB"], ids=["recomputed", "kept"])
def test_a_cache_that_units_fill(kit: SimpleNamespace, settings: dict[str, Any], activation_memory: Any) -> None:
    settings = {**settings, "activation_memory": activation_memory}
    kit.train_both(WithCache, lambda call, module, step: call(noise(step), Cache()), settings)


@pytest.mark.parametrize("activation_memory", [0, "1MiB"], ids=["recomputed", "kept"])
def test_lists_and_dicts_that_units_fill(
    kit: SimpleNamespace, settings: dict[str, Any], activation_memory: Any
) -> None:
    settings = {**settings, "activation_memory": activation_memory}
    kit.train_both(WithLists, lambda call, module, step: call(noise(step)), settings)


def engine_of(model: nn.Module, **settings: Any) -> OffloadEngine:
    return OffloadEngine(model, SGD(lr=0.1), OffloadConfig(device="cpu", dtype=torch.float32, **settings))


@pytest.mark.parametrize("activation_memory", [0, "1MiB"], ids=["recomputed", "kept"])
def test_a_cache_after_backward_is_as_forward_left_it(activation_memory: Any) -> None:
    with engine_of(WithCache(), activation_memory=activation_memory) as engine:
        cache = Cache()
        loss = engine(noise(0), cache)
        layers = list(cache.layers)
        before = [(layer.seen, layer.keys) for layer in layers]
        assert [seen for seen, _ in before] == [3, 3, 3]
        engine.backward(loss)
        assert [id(layer) for layer in cache.layers] == [id(layer) for layer in layers]
        assert all(
            layer.seen == seen and layer.keys is keys for layer, (seen, keys) in zip(layers, before, strict=True)
        )


def test_a_call_that_raises_gives_the_cache_back() -> None:
    model = WithCache()
    with engine_of(model) as engine:
        cache = Cache([Layer(noise(1), 3)])
        mine = cache.layers[0].keys
        with pytest.raises(RuntimeError, match=r"shapes|size"):
            model.blocks[0](torch.ones(3, 5), cache=cache)
        assert len(cache.layers) == 1 and cache.layers[0].keys is mine and cache.layers[0].seen == 3
        engine.backward(engine(noise(0), Cache()))


def test_a_dropped_cache_frees_its_graph() -> None:
    """A cache refers to the graph, so the graph may not refer to the cache: such a circle is never collected."""
    with engine_of(WithCache()) as engine:
        cache = Cache()
        loss = engine(noise(0), cache)
        keys = weakref.ref(cache.layers[0].keys)
        assert keys() is not None
        del loss, cache
        gc.collect()
        assert keys() is None
        engine.backward(engine(noise(1), Cache()))
        engine.step()


@pytest.mark.parametrize("activation_memory", [0, "1MiB"], ids=["recomputed", "kept"])
def test_what_a_hook_of_the_user_takes_out_of_a_unit_cannot_be_trained_through(activation_memory: Any) -> None:
    """Its gradients would be those of other parameters: where the unit lay, another one lies by then."""
    model = WithLists()
    taken: list[Tensor] = []
    for block in model.blocks:
        block.linear.register_forward_hook(lambda module, inputs, output: taken.append(output))
    with engine_of(model, activation_memory=activation_memory, units=[Collecting]) as engine:
        loss = engine(noise(0))
        with pytest.raises(RuntimeError, match=r"inside unit 'blocks\.\d' was used outside of the engine's backward"):
            engine.backward(loss + sum(value.square().mean() for value in taken))
        engine.drop_gradients()


class Forces(nn.Module):
    """Differentiates inside its forward, as models of energies do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (force,) = torch.autograd.grad(self.inner(x).sum(), x, create_graph=True)
        return force


@pytest.mark.parametrize("activation_memory", [0, "1MiB"], ids=["recomputed", "kept"])
def test_a_unit_may_differentiate_inside_its_forward(
    kit: SimpleNamespace, settings: dict[str, Any], activation_memory: Any
) -> None:
    kit.train_both(
        lambda: nn.Sequential(nn.Linear(8, 8), Forces(), nn.Linear(8, 8)),
        lambda call, module, step: call(noise(step)).square().mean(),
        {**settings, "activation_memory": activation_memory, "units": [Forces]},
    )
