"""Parameters that are frozen and unfrozen between steps get what plain torch gives them, or a refusal with the mend."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offload import AdamW, OffloadConfig, OffloadEngine

LR = 1e-2


class Net(nn.Module):
    """Four units; `scale` belongs to the root, which computes with it itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(13, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)) for _ in range(2))
        self.scale = nn.Parameter(torch.full((8,), 0.75))
        self.head = nn.Linear(8, 13)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x * self.scale).float().square().mean()


TOKENS = torch.arange(12).reshape(3, 4) % 13


def plain(num_steps: int, act: Callable[[nn.Module, int], None], start: nn.Module) -> tuple[list[float], nn.Module]:
    optimizer = torch.optim.AdamW(start.parameters(), lr=LR)
    losses = []
    for step in range(num_steps):
        act(start, step)
        loss = start(TOKENS)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, start


def assert_as_torch(
    kit: SimpleNamespace,
    settings: dict[str, Any],
    num_steps: int,
    act: Callable[[nn.Module, int], None],
    model: nn.Module | None = None,
    **more: Any,
) -> None:
    """Losses, values and which parameters age are those of plain torch, where `act(model, step)` precedes each step."""
    model = model if model is not None else Net()
    expected, trained = plain(num_steps, act, kit.clone(model))
    config = OffloadConfig(dtype=torch.float32, **{**settings, **more})
    with OffloadEngine(model, AdamW(lr=LR), config) as engine:
        losses = []
        for step in range(num_steps):
            act(model, step)
            loss = engine(TOKENS)
            engine.backward(loss)
            engine.step()
            losses.append(float(loss.detach()))
        assert losses == pytest.approx(expected, rel=1e-6)
        for name, value in trained.state_dict().items():
            torch.testing.assert_close(engine.state_dict()[name], value, rtol=1e-5, atol=1e-6, msg=name)


def freeze_block(model: nn.Module, step: int) -> None:
    if step in (1, 3):
        model.get_submodule("blocks.0").requires_grad_(step == 3)
    if step in (2, 4):
        model.get_parameter("head.bias").requires_grad_(step == 4)


def test_frozen_for_a_while(kit: SimpleNamespace, settings: dict[str, Any]) -> None:
    """A frozen parameter has no gradient and is untouched, also by weight decay; unfrozen again, it goes on."""
    assert_as_torch(kit, settings, 6, freeze_block)


def test_frozen_parameter_keeps_its_bits_and_its_age(kit: SimpleNamespace, settings: dict[str, Any]) -> None:
    model = Net()
    with OffloadEngine(model, AdamW(lr=LR), OffloadConfig(dtype=torch.float32, **settings)) as engine:
        for step in range(3):
            if step == 1:
                model.blocks[0].requires_grad_(False)
                before = kit.state_of(engine)
            engine.backward(engine(TOKENS))
            engine.step()
        after = kit.state_of(engine)
        for name in before:
            same = kit.bits(before[name].value) == kit.bits(after[name].value)
            assert same == name.startswith("blocks.0."), name
            assert after[name].step == (1 if name.startswith("blocks.0.") else 3), name


@pytest.mark.parametrize("act", ["all", "unit", "touched"])
def test_whole_units_frozen_for_a_while(kit: SimpleNamespace, settings: dict[str, Any], act: str) -> None:
    def freeze(model: nn.Module, step: int) -> None:
        frozen = step == 1
        if act == "all":
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(not frozen or name == "head.weight")
        elif act == "unit":
            model.get_submodule("embed").requires_grad_(not frozen)
        else:
            model.get_parameter("scale").requires_grad_(not frozen)

    assert_as_torch(kit, settings, 3, freeze)


def start_frozen() -> nn.Module:
    model = Net()
    model.blocks.requires_grad_(False)
    model.scale.requires_grad_(False)
    return model


def unfreeze_slowly(model: nn.Module, step: int) -> None:
    if step == 1:
        model.get_submodule("blocks.1").requires_grad_(True)
    if step == 2:
        model.get_submodule("blocks.0").requires_grad_(True)
        model.get_parameter("scale").requires_grad_(True)


def test_reserved_states_serve_what_starts_frozen(kit: SimpleNamespace, settings: dict[str, Any]) -> None:
    assert_as_torch(kit, settings, 4, unfreeze_slowly, start_frozen(), trainable=["blocks.*", "scale"])


def test_bf16_master_of_what_starts_frozen_is_exact(kit: SimpleNamespace) -> None:
    """It is the fp32 value that the parameter came with, not what it computed with while it was frozen."""
    model = start_frozen()
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    with OffloadEngine(model, AdamW(lr=LR), OffloadConfig(device="cpu", trainable=["*"])) as engine:
        for name, host in kit.state_of(engine).items():
            assert kit.bits(host.value) == kit.bits(values[name]), name


@pytest.mark.parametrize("name", ["blocks.1.0.weight", "scale"])
def test_unfrozen_without_states_is_refused(settings: dict[str, Any], name: str) -> None:
    """By the next forward, and by the next backward; frozen again, everything goes on."""
    model = start_frozen()
    message = rf"{re.escape(repr(name))} was frozen when the engine was built.*OffloadConfig\(trainable=\['{name}'\]\)"
    with OffloadEngine(model, AdamW(lr=LR), OffloadConfig(dtype=torch.float32, **settings)) as engine:
        model.get_parameter(name).requires_grad_(True)
        with pytest.raises(RuntimeError, match=message):
            engine(TOKENS)
        model.get_parameter(name).requires_grad_(False)
        engine.backward(engine(TOKENS))
        engine.step()


def test_unfrozen_before_backward_is_refused_or_without_a_gradient(settings: dict[str, Any]) -> None:
    model = start_frozen()
    with OffloadEngine(
        model, AdamW(lr=LR), OffloadConfig(dtype=torch.float32, activation_memory=0, **settings)
    ) as engine:
        loss = engine(TOKENS)
        model.blocks[1].requires_grad_(True)
        with pytest.raises(RuntimeError, match=r"blocks\.1.* was frozen when the engine was built"):
            engine.backward(loss)
        model.blocks[1].requires_grad_(False)
        engine.optimizer.zero_grad()
        engine.backward(engine(TOKENS))
        engine.step()


@pytest.mark.parametrize("kept", ["kept", "recomputed"])
@pytest.mark.parametrize("to", [True, False])
def test_changed_between_forward_and_backward(kit: SimpleNamespace, kept: str, to: bool) -> None:
    """A graph that was made without a parameter gives it no gradient, and one that is frozen meanwhile gets none."""
    model = Net()
    model.blocks[0].requires_grad_(not to)
    twin = kit.clone(model)
    memory = {} if kept == "kept" else {"activation_memory": 0}
    config = OffloadConfig(device="cpu", dtype=torch.float32, trainable=["*"], **memory)
    with OffloadEngine(model, AdamW(lr=LR), config) as engine:
        for call, backward in ((twin, torch.Tensor.backward), (engine, engine.backward)):
            module = twin if call is twin else model
            loss = call(TOKENS)
            module.blocks[0].requires_grad_(to)
            backward(loss)
        with engine.gather("*") as parameters:
            found = {name for name, host in parameters.items() if host.grad is not None}
            for name, parameter in twin.named_parameters():
                assert (parameter.grad is not None) == (name in found), name
                if parameter.grad is not None:
                    torch.testing.assert_close(parameters[name].grad, parameter.grad)
        assert not any(name.startswith("blocks.0") for name in found)


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"trainable has 'layers\.\*', which matches no parameter; names look like"):
        OffloadEngine(Net(), AdamW(), OffloadConfig(device="cpu", trainable=["layers.*"]))
    with pytest.raises(ValueError, match=r"trainable='\*' is one string"):
        OffloadConfig(trainable="*")


def test_reserved_states_survive(kit: SimpleNamespace, tmp_path: Path) -> None:
    """A run that unfreezes, is closed and resumed goes on as one that was not."""
    settings = {"device": "cpu", "dtype": torch.float32, "host_memory": "16MiB", "trainable": ["blocks.*", "scale"]}

    def run(folder: Path, stops: bool) -> dict[str, Any]:
        model = start_frozen()
        engine = OffloadEngine(model, AdamW(lr=LR), OffloadConfig(nvme=folder, **settings))
        for step in range(4):
            if stops and step == 2:
                engine.close()
                model = start_frozen()
                unfreeze_slowly(model, 1)
                engine = OffloadEngine(model, AdamW(lr=LR), OffloadConfig(nvme=folder, resume=True, **settings))
            unfreeze_slowly(model, step)
            engine.backward(engine(TOKENS))
            engine.step()
        with engine:
            return dict(kit.state_of(engine))

    kit.assert_same_state(run(tmp_path / "a", False), run(tmp_path / "b", True))
