"""Activations kept for backward: the bits of recomputation, slots that were used by others meanwhile, and a budget."""

from __future__ import annotations

import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from offload import SGD, AdamW, OffloadConfig, OffloadEngine
from offload.activations import ActivationBudget, SavedTensors
from offload.calls import UnitForward
from offload.scheduler.devices import FakeDevice

ALL_NVME = {"param": "nvme", "states": "nvme", "grad": "nvme"}
FP32: dict[str, Any] = {"dtype": torch.float32}


class Stack(nn.Module):
    """Pairs of linear layers with tanh between; autograd saves inputs, results and transposed views of weights."""

    def __init__(self, depth: int = 4, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width)) for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def gradients_of(engine: OffloadEngine) -> dict[str, Tensor]:
    with engine.gather("*") as values:
        return {name: value.grad.clone() for name, value in values.items() if value.grad is not None}


def counted_calls(module: nn.Module) -> list[str]:
    """Names of the first parts of units that ran, in order, also in backward."""
    ran: list[str] = []
    for name, part in module.named_modules():
        if name.endswith(".0"):
            part.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    return ran


def placement(name: str, folder: Path) -> dict[str, Any]:
    if name == "nvme":
        return {"device": "cpu", "nvme": folder, "homes": ALL_NVME, "host_memory": "1MiB"}
    if name == "fake":
        return {"device": FakeDevice(max_delay_s=2e-4), "device_memory": "64KiB", "host_memory": "4MiB"}
    return {"device": "cpu", "host_memory": "64MiB"}


@pytest.mark.parametrize("where", ["memory", "nvme", "fake"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_and_recomputed_give_the_same_bits(
    kit: SimpleNamespace, where: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    data = kit.batches(8)
    settings = {"dtype": dtype, "micro_batches": 2, "clip_grad_norm": 0.5}

    def run(activation_memory: str | int, folder: str) -> Any:
        config = OffloadConfig(**{**placement(where, tmp_path / folder), "host_memory": "4MiB", **settings,
                                  "activation_memory": activation_memory, "device_memory": "auto"})  # fmt: skip
        return kit.engine_run(kit.TinyGPT(dropout=0.1, depth=3), AdamW(lr=1e-2), config, data)

    kit.assert_same_run(run("64MiB", "kept"), run(0, "recomputed"))


@pytest.mark.parametrize("where", ["memory", "nvme", "fake"])
def test_what_fits_is_not_computed_again(where: str, tmp_path: Path) -> None:
    model = Stack()
    with OffloadEngine(model, SGD(), OffloadConfig(**FP32, **placement(where, tmp_path))) as engine:
        ran = counted_calls(model)
        for _ in range(2):
            engine.backward(engine(torch.ones(2, 16)).square().mean())
            engine.step()
        assert [name for name in ran if name != "layers.0"] == [f"layers.{i}.0" for i in range(4)] * 2
        assert engine.memory.activations_peak_nbytes > 0
        assert engine._runtime.activations.held_nbytes == 0


def test_a_saved_view_of_a_slot_that_others_used_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three slots for four units, which lie elsewhere in backward than in forward. With the guard taken out (slots
    saved as they are) the gradients are wrong."""

    def gradients() -> dict[str, Tensor]:
        config = OffloadConfig(**FP32, device=FakeDevice(max_delay_s=2e-4), device_memory=3 * 8192, host_memory="4MiB")
        with OffloadEngine(Stack(), SGD(), config) as engine:
            loss = engine(torch.linspace(-1, 1, 32).view(2, 16)).square().mean()
            units = [layout.unit for layout in engine._parts.layouts]
            engine._loop.run(engine._residency.evict(units))
            engine._residency.acquire(units[1:2])
            engine._residency.acquire(units[0:1])
            engine.backward(loss)
            for unit in units[:2]:
                engine._residency.release([unit])
            return gradients_of(engine)

    plain = Stack()
    plain(torch.linspace(-1, 1, 32).view(2, 16)).square().mean().backward()
    expected = {name: p.grad for name, p in plain.named_parameters()}
    found = gradients()
    assert all(torch.equal(found[name], expected[name]) for name in expected)

    init = SavedTensors.__init__

    def blind(saved: SavedTensors, *args: Any) -> None:
        init(saved, *args)
        saved._slots = {}

    monkeypatch.setattr(SavedTensors, "__init__", blind)
    found = gradients()
    assert not all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_budget_is_kept(kit: SimpleNamespace) -> None:
    """A quarter of what everything would take: some units are kept, the others computed again, numbers are the same."""
    x, y = kit.batches(1)[0]

    def peak(budget: int | str) -> tuple[int, float]:
        config = OffloadConfig(**FP32, device="cpu", host_memory="64MiB", activation_memory=budget)
        with OffloadEngine(kit.TinyGPT(depth=6), SGD(lr=0.1), config) as engine:
            for _ in range(3):
                engine.backward(engine(x, y))
                info = engine.step()
            return engine.memory.activations_peak_nbytes, info.loss

    whole, loss = peak("64MiB")
    some, same_loss = peak(whole // 4)
    assert 0 < some <= whole // 4
    assert same_loss == loss
    assert peak(0) == (0, loss)


def test_graphs_without_backward_give_their_memory_back() -> None:
    with OffloadEngine(Stack(), SGD(), OffloadConfig(**FP32, device="cpu", host_memory="64MiB")) as engine:
        loss = engine(torch.ones(2, 16)).square().mean()
        assert engine._runtime.activations.held_nbytes > 0
        del loss
        gc.collect()
        assert engine._runtime.activations.held_nbytes == 0


def test_a_graph_that_is_visited_twice_is_computed_again_the_second_time() -> None:
    config = OffloadConfig(**FP32, device="cpu", host_memory="64MiB", micro_batches=2)
    plain = Stack()
    loss = plain(torch.ones(2, 16)).square().mean()
    loss.backward(retain_graph=True)
    loss.backward()
    with OffloadEngine(Stack(), SGD(), config) as engine:
        loss = engine(torch.ones(2, 16)).square().mean()
        loss.backward(retain_graph=True)
        loss.backward()
        found = gradients_of(engine)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)


class Returns(nn.Module):
    """tanh's backward needs its result, which is what the caller gets."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.last = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        hidden.mul_(3.0)  # plain torch refuses this; the engine's result is a tensor of its own
        return self.last(hidden)


def test_a_result_changed_in_place_does_not_change_what_was_saved() -> None:
    x = torch.linspace(-1, 1, 16).view(2, 8)
    found = []
    for budget in (0, "64MiB"):
        config = OffloadConfig(**FP32, device="cpu", host_memory="64MiB", activation_memory=budget)
        with OffloadEngine(Returns(), SGD(), config) as engine:
            assert any(isinstance(m.forward, UnitForward) for m in engine.module.modules())
            engine.backward(engine(x).sum())
            found.append(gradients_of(engine))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


class Noted(nn.Module):
    """Saves a buffer of its own, and changes it later."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("scale", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.scale


def test_a_saved_tensor_changed_in_place_is_named() -> None:
    config = OffloadConfig(**FP32, device="cpu", host_memory="64MiB")
    with OffloadEngine(nn.Sequential(Noted(), nn.Linear(4, 1)), SGD(), config) as engine:
        loss = engine(torch.ones(1, 4)).sum()
        engine.module[0].scale.mul_(2)
        with pytest.raises(RuntimeError, match=r"unit '0' needs .* in-place"):
            engine.backward(loss)
        engine.optimizer.zero_grad()


@pytest.mark.parametrize("activation_memory", [0, "auto"])
def test_a_graph_from_before_a_step_is_refused_as_torch_does(activation_memory: Any) -> None:
    """What was kept would be multiplied with parameters of another step. A unit that no step changed may go on."""
    config = OffloadConfig(device="cpu", activation_memory=activation_memory, **FP32)
    with OffloadEngine(Stack(), AdamW(lr=1e-6), config) as engine:
        x = torch.randn(2, 16, generator=torch.Generator().manual_seed(1))
        old = engine(x).square().mean()
        unused = engine.module.layers[3](x).square().mean()
        engine.backward(engine.module.layers[0](x).square().mean())
        engine.step()
        engine.backward(unused)
        engine.optimizer.zero_grad()
        with pytest.raises(RuntimeError, match=r"'layers\.0', whose values were changed since this forward by step"):
            engine.backward(old)
        engine.optimizer.zero_grad()
        engine.backward(engine(x).square().mean())
        engine.step()


class CheckpointedPairs(Stack):
    """The user's own checkpoint around several calls of units."""

    def forward(self, x: Tensor) -> Tensor:
        for first, second in zip(self.layers[::2], self.layers[1::2], strict=True):
            x = checkpoint(lambda x, first=first, second=second: second(torch.tanh(first(x))), x, use_reentrant=False)
        return x


@pytest.mark.parametrize("keeps", [(False, True), (True, False)])
def test_a_checkpoint_around_calls_may_find_another_budget_when_it_computes_again(
    keeps: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint counts what is saved inside it, so that must not hang on whether a call keeps its graph."""
    forward = [True]
    monkeypatch.setattr(ActivationBudget, "may_keep", lambda *_: keeps[0] if forward[0] else keeps[1])
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(5))
    plain = CheckpointedPairs()
    plain(x).square().sum().backward()
    config = OffloadConfig(device="cpu", host_memory="64MiB", activation_memory="1MiB", **FP32)
    with OffloadEngine(CheckpointedPairs(), SGD(), config) as engine:
        loss = engine(x).square().sum()
        forward[0] = False
        engine.backward(loss)
        found = gradients_of(engine)
    for name, parameter in plain.named_parameters():
        assert torch.equal(found[name], parameter.grad), name  # type: ignore[arg-type]
