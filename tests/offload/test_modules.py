"""Any module: whatever plain torch can train, the engine trains to the same numbers, in every placement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from offload import AdamW, OffloadConfig, OffloadEngine

Loss = Callable[[Callable[..., Any], nn.Module, int], Tensor]


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def simple_loss(call: Callable[..., Any], module: nn.Module, step: int) -> Tensor:
    """Mean square of what the module makes of [3, 8]."""
    return call(noise(3, 8, seed=step)).square().mean()


def mlp(width: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


class SharedModule(nn.Module):
    """One module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = mlp()
        self.middle = nn.Linear(8, 8)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.middle(self.first(x)))


class TiedAcrossBlocks(nn.Module):
    """Two blocks that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(mlp() for _ in range(3))
        self.blocks[2][0].weight = self.blocks[0][0].weight

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


class BareParameters(nn.Module):
    """Parameters that the root and a router hold and use themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((8,), 1.5))
        self.blocks = nn.ModuleList(mlp() for _ in range(2))
        self.one = nn.Parameter(torch.tensor(0.5))
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale
        for block in self.blocks:
            x = block(x) * self.one
        return x + self.scale


class CalledOften(nn.Module):
    """A block called three times per forward, between others."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = mlp()
        self.gate = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + self.cell(torch.tanh(self.gate(x)))
        return x


class ReadsOthers(nn.Module):
    """Units that read another unit's weight without calling it, before and after it was called."""

    class Reader(nn.Module):
        def __init__(self, other: nn.Linear) -> None:
            super().__init__()
            self.own = nn.Linear(8, 8)
            self.other = [other]  # in a list: not a child

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.own(x), self.other[0].weight, self.other[0].bias)

    def __init__(self) -> None:
        super().__init__()
        self.source = nn.Linear(8, 8)
        self.early = self.Reader(self.source)
        self.late = self.Reader(self.source)

    def __deepcopy__(self, memo: dict[int, Any]) -> ReadsOthers:
        twin = ReadsOthers()
        twin.load_state_dict(self.state_dict())
        return twin

    def forward(self, x: Tensor) -> Tensor:
        return self.late(self.source(self.early(x)))


class ParentUsesChild(nn.Module):
    """A parent that computes with its embedding's weight itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.block = mlp()

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.block(self.embed(tokens)), self.embed.weight)


class LeavesAuxiliaryLoss(nn.Module):
    """A block that leaves a second loss in an attribute, as mixtures of experts do."""

    class Balanced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(8, 4)
            self.out = nn.Linear(4, 8)
            self.auxiliary: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            share = self.gate(x).softmax(-1)
            self.auxiliary = share.mean(0).square().sum()
            return self.out(share)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self.Balanced() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x.square().mean() + 0.1 * sum(block.auxiliary for block in self.blocks)


@dataclass
class Carrier:
    """A plain dataclass with a tensor, a nested structure and something that is no tensor."""

    hidden: Tensor
    extras: dict[str, Any]
    label: str = "carrier"


class Structures(nn.Module):
    """Units that take and return dataclasses, dicts and tuples."""

    class TakesDict(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, inputs: dict[str, Any], *, power: int) -> Carrier:
            hidden = self.linear(inputs["x"]) ** power
            return Carrier(hidden, {"pair": (hidden.sum(), 3), "none": None, "list": [hidden * 2]})

    class TakesCarrier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, carrier: Carrier) -> tuple[Tensor, dict[str, Any]]:
            assert carrier.label == "carrier" and carrier.extras["pair"][1] == 3 and carrier.extras["none"] is None
            return self.linear(carrier.hidden + carrier.extras["list"][0]), {"sum": carrier.extras["pair"][0]}

    def __init__(self) -> None:
        super().__init__()
        self.first = self.TakesDict()
        self.second = self.TakesCarrier()

    def forward(self, x: Tensor) -> Carrier:
        hidden, extras = self.second(self.first({"x": x}, power=2))
        return Carrier(hidden, extras)


class OddSizes(nn.Module):
    """Parameters of no element and of one."""

    def __init__(self) -> None:
        super().__init__()
        self.empty = nn.Parameter(torch.empty(0, 5))
        self.block = nn.Module()
        self.block.empty = nn.Parameter(torch.empty(0))
        self.block.one = nn.Parameter(torch.tensor([2.0]))
        self.block.forward = lambda x: x * self.block.one + self.block.empty.sum()
        self.linear = nn.Linear(8, 1)

    def __deepcopy__(self, memo: dict[int, Any]) -> OddSizes:
        twin = OddSizes()
        twin.load_state_dict(self.state_dict())
        return twin

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.block(x)) + self.empty.sum()


class ManyTiny(nn.Module):
    """A unit of 2000 parameters of three elements."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Module()
        self.block.all = nn.ParameterList(nn.Parameter(0.02 * noise(3, seed=i)) for i in range(2000))
        self.block.forward = self._sum
        self.linear = nn.Linear(3, 2)

    def _sum(self, x: Tensor) -> Tensor:
        return x + torch.stack(list(self.block.all)).sum(0)

    def __deepcopy__(self, memo: dict[int, Any]) -> ManyTiny:
        twin = ManyTiny()
        twin.load_state_dict(self.state_dict())
        return twin

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.block(x))


class Attention(nn.Module):
    """`nn.MultiheadAttention` reads `out_proj.weight` without calling `out_proj`."""

    def __init__(self, as_block: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.blocks = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True) for _ in range(2)])
        self.as_block = as_block

    def forward(self, x: Tensor) -> Tensor:
        x = x[None]
        if self.as_block:
            for block in self.blocks:
                x = block(x)
        return self.attention(x, x, x, need_weights=False)[0]


class ConvNet(nn.Module):
    """BatchNorm's statistics must be updated once per forward, not again in the recomputation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, momentum=None), nn.ReLU())
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x.repeat(1, 8)[:, None, None].expand(-1, 1, 8, -1))).mean((2, 3)))


class Checkpointed(nn.Module):
    """A user's own activation checkpointing around units."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(mlp() for _ in range(3))
        self.reentrant = reentrant
        self.first = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x


class InPlaceAfter(nn.Module):
    """Results of units that the parent changes in place, and in-place activations inside units."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 8))
        self.second = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x += 1.0
        y = self.second(x)
        y.mul_(2.0)
        return y


def lstm() -> nn.Module:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(8, 6, num_layers=2, batch_first=True, bidirectional=True)
            self.head = nn.Linear(12, 8)

        def forward(self, x: Tensor) -> Tensor:
            hidden, (h, c) = self.lstm(x[None])
            return self.head(hidden) + h.sum() + c.mean()

    return Wrapped()


MODULES: dict[str, Callable[[], nn.Module]] = {
    "single linear": lambda: nn.Linear(8, 8),
    "sequential": mlp,
    "shared module": SharedModule,
    "tied across blocks": TiedAcrossBlocks,
    "bare parameters": BareParameters,
    "called often": CalledOften,
    "reads others": ReadsOthers,
    "odd sizes": OddSizes,
    "multihead attention": lambda: Attention(False),
    "encoder layers": lambda: Attention(True),
    "transformer encoder": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True), 2, enable_nested_tensor=False
    ),
    "lstm": lstm,
    "batch norm": ConvNet,
    "checkpointed": lambda: Checkpointed(False),
    "in place": InPlaceAfter,
    "weight norm": lambda: nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.Tanh(), nn.Linear(8, 8)
    ),
}


def seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(11)
        return make()

    return build


@pytest.mark.parametrize("name", MODULES)
def test_module_trains_as_in_torch(kit: SimpleNamespace, settings: dict[str, Any], name: str) -> None:
    kit.train_both(seeded(MODULES[name]), simple_loss, settings)


def test_reentrant_checkpointing_is_refused(settings: dict[str, Any]) -> None:
    """Its backward runs backwards of its own, so the engine could not tell when the whole one has ended."""
    with OffloadEngine(Checkpointed(True), AdamW(), OffloadConfig(dtype=torch.float32, **settings)) as engine:
        loss = engine(noise(3, 8)).square().mean()
        with pytest.raises(
            RuntimeError, match=r"use_reentrant=True.*switch gradient checkpointing off, or .*use_reentrant=False"
        ):
            engine.backward(loss)
        engine.module.reentrant = False
        engine.optimizer.zero_grad()
        engine.backward(engine(noise(3, 8)).square().mean())
        assert not engine.step().skipped


def test_parent_computes_with_its_embedding(kit: SimpleNamespace, settings: dict[str, Any]) -> None:
    tokens = torch.arange(12) % 11

    def loss_of(call: Callable[..., Any], module: nn.Module, step: int) -> Tensor:
        return F.cross_entropy(call(tokens), tokens)

    kit.train_both(seeded(ParentUsesChild), loss_of, settings)


def test_loss_left_in_an_attribute(kit: SimpleNamespace, settings: dict[str, Any]) -> None:
    kit.train_both(seeded(LeavesAuxiliaryLoss), lambda call, module, step: call(noise(3, 8, seed=step)), settings)


def test_dicts_tuples_and_dataclasses(kit: SimpleNamespace, settings: dict[str, Any]) -> None:
    def loss_of(call: Callable[..., Any], module: nn.Module, step: int) -> Tensor:
        carrier = call(noise(3, 8, seed=step))
        assert isinstance(carrier, Carrier)
        return carrier.hidden.square().mean() + 0.01 * carrier.extras["sum"]

    kit.train_both(seeded(Structures), loss_of, settings)


def test_two_thousand_tiny_parameters(kit: SimpleNamespace, settings: dict[str, Any]) -> None:
    kit.train_both(seeded(ManyTiny), lambda call, m, step: call(noise(2, 3, seed=step)).square().mean(), settings)


def test_embedding_larger_than_a_chunk(
    kit: SimpleNamespace, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offload.layout.CHUNK_NUMEL", 2048)
    tokens = torch.arange(64) * 37 % 1999

    def loss_of(call: Callable[..., Any], module: nn.Module, step: int) -> Tensor:
        return call(tokens).square().mean()

    kit.train_both(seeded(lambda: nn.Sequential(nn.Embedding(1999, 9), nn.Linear(9, 3))), loss_of, settings)


def test_two_forwards_before_one_backward(kit: SimpleNamespace, settings: dict[str, Any]) -> None:
    def loss_of(call: Callable[..., Any], module: nn.Module, step: int) -> Tensor:
        one, other = call(noise(3, 8, seed=step)), call(noise(3, 8, seed=step + 100))
        return (one - other).square().mean()

    for make in (mlp, CalledOften, BareParameters, TiedAcrossBlocks):
        kit.train_both(seeded(make), loss_of, settings)


def test_units_that_a_forward_skips_are_untouched(kit: SimpleNamespace, settings: dict[str, Any]) -> None:
    """Layer `step` is skipped in each step: its weights, moments and step count stay, as in torch."""

    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(mlp() for _ in range(3))
            self.never = nn.Linear(8, 8)

        def forward(self, x: Tensor, skipped: int) -> Tensor:
            for index, block in enumerate(self.blocks):
                x = x if index == skipped else block(x)
            return x

    start = seeded(Skipping)()
    _, run = kit.train_both(
        seeded(Skipping), lambda call, module, step: call(noise(3, 8), step % 3).square().mean(), settings, num_steps=4
    )
    assert [run.state[f"blocks.{i}.0.weight"].step for i in range(3)] == [2, 3, 3]
    never = run.state["never.weight"]
    assert never.step == 0
    assert kit.bits(never.value) == kit.bits(start.never.weight)
    assert all(not state.any() for state in never.states.values())


def test_gradient_reaches_the_input(kit: SimpleNamespace, settings: dict[str, Any]) -> None:
    inputs: list[Tensor] = []

    def loss_of(call: Callable[..., Any], module: nn.Module, step: int) -> Tensor:
        inputs.append(noise(3, 8, seed=step).requires_grad_())
        return call(inputs[-1]).square().mean()

    kit.train_both(seeded(CalledOften), loss_of, settings, num_steps=1)
    assert inputs[0].grad is not None and inputs[1].grad is not None
    assert kit.bits(inputs[0].grad) == kit.bits(inputs[1].grad)


def test_frozen_unit_passes_gradients_through(kit: SimpleNamespace, settings: dict[str, Any]) -> None:
    def make() -> nn.Module:
        model = nn.Sequential(mlp(), mlp(), mlp())
        model[1].requires_grad_(False)
        model[2][0].bias.requires_grad_(False)
        return model

    plain, run = kit.train_both(seeded(make), simple_loss, settings)
    for name in ("1.0.weight", "2.0.bias"):
        assert kit.bits(run.state[name].value) == kit.bits(dict(plain.named_parameters())[name])
        assert run.state[name].states == {}


def test_integer_parameters_stay_frozen(kit: SimpleNamespace, settings: dict[str, Any]) -> None:
    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.codes = nn.Parameter(torch.arange(-32, 32, dtype=torch.int8).view(8, 8), requires_grad=False)
            self.scale = nn.Parameter(torch.tensor([0.05]))

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.codes.float() * self.scale)

    _, run = kit.train_both(seeded(lambda: nn.Sequential(mlp(), Quantised())), simple_loss, settings)
    assert run.state["1.codes"].value.dtype == torch.int8
    assert run.state["1.codes"].value.view(-1).tolist() == list(range(-32, 32))


def test_second_backward_of_a_retained_graph(kit: SimpleNamespace, settings: dict[str, Any]) -> None:
    """Two micro-batches over one graph: the gradient is twice that of one, which in fp32 is exact."""
    once = seeded(CalledOften)()
    simple_loss(once, once, 0).backward()
    config = OffloadConfig(dtype=torch.float32, micro_batches=2, **settings)
    with OffloadEngine(seeded(CalledOften)(), AdamW(), config) as engine:
        loss = simple_loss(engine, engine.module, 0)
        engine.backward(loss, retain_graph=True)
        engine.backward(loss)
        with engine.gather("*") as parameters:
            for name, parameter in once.named_parameters():
                assert kit.bits(parameters[name].grad) == kit.bits(2 * parameter.grad), name
        engine.step()


def test_running_statistics_count_once(kit: SimpleNamespace, settings: dict[str, Any]) -> None:
    counts: list[int] = []

    def look(engine: OffloadEngine, plain: nn.Module) -> None:
        counts.append(int(engine.module.stem[1].num_batches_tracked))
        counts.append(int(plain.stem[1].num_batches_tracked))

    kit.train_both(seeded(ConvNet), simple_loss, settings, look=look)
    assert counts == [3, 3]
