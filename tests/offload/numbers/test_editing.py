"""Reading and editing single parameters between backward and step does what the same edit does in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offload import AdamW, OffloadConfig, OffloadEngine, TorchOptimizer
from offload.access import ParameterAccess
from offload.optimizers import OptimizerSpec

LR = 1e-2
NAME = "0.weight"
SPECS: dict[str, tuple[OptimizerSpec, Callable[[Any], torch.optim.Optimizer]]] = {
    "adamw": (AdamW(lr=LR), lambda ps: torch.optim.AdamW(ps, lr=LR)),
    "torch": (TorchOptimizer(torch.optim.NAdam, lr=LR), lambda ps: torch.optim.NAdam(ps, lr=LR)),
}


def make() -> nn.Module:
    torch.manual_seed(6)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 7), nn.Tanh(), nn.Linear(7, 1))


def loss_of(call: Callable[[Tensor], Tensor], step: int) -> Tensor:
    return (call(torch.randn(5, 6, generator=torch.Generator().manual_seed(step))) - 1.0).square().mean()


class Pair:
    """The same training in plain torch and through an engine, step by step."""

    def __init__(self, which: str, settings: dict[str, Any], clip: float | None = None) -> None:
        spec, make_optimizer = SPECS[which]
        self.plain = make()
        self.optimizer = make_optimizer(self.plain.parameters())
        self.clip = clip
        config = OffloadConfig(dtype=torch.float32, clip_grad_norm=clip, ema_decay=0.9, **settings)
        self.engine = OffloadEngine(make(), spec, config)
        self.number = 0

    @property
    def parameter(self) -> nn.Parameter:
        return dict(self.plain.named_parameters())[NAME]

    def backward(self) -> None:
        loss_of(self.plain, self.number).backward()
        self.engine.backward(loss_of(self.engine, self.number))
        self.number += 1

    def step(self) -> None:
        norm = nn.utils.clip_grad_norm_(self.plain.parameters(), self.clip or float("inf"))
        self.optimizer.step()
        self.optimizer.zero_grad()
        assert self.engine.step().grad_norm == pytest.approx(float(norm), rel=1e-5)

    def close(self, kit: SimpleNamespace) -> None:
        values = {name: host.value for name, host in kit.state_of(self.engine).items()}
        start = {name: p.detach() for name, p in make().named_parameters()}
        expected = {name: p.detach() for name, p in self.plain.named_parameters()}
        assert kit.relative_difference(values, expected, start) <= 1e-4
        self.engine.close()


@pytest.mark.parametrize("which", SPECS)
@pytest.mark.parametrize("clip", [None, 0.5])
def test_edited_gradients(kit: SimpleNamespace, settings: dict[str, Any], which: str, clip: float | None) -> None:
    """The norm, and with it clipping, follows."""
    pair = Pair(which, settings, clip)
    for step in range(4):
        pair.backward()
        gradient = pair.parameter.grad
        assert gradient is not None
        gradient.mul_(5.0 if step == 1 else -0.5)
        with pair.engine.gather(NAME, write=True) as parameters:
            shown = parameters[NAME].grad
            assert shown is not None
            shown.mul_(5.0 if step == 1 else -0.5)
            torch.testing.assert_close(shown, gradient, rtol=1e-4, atol=1e-6)
        pair.step()
    pair.close(kit)


@pytest.mark.parametrize("which", SPECS)
def test_edited_moments_and_masters(kit: SimpleNamespace, settings: dict[str, Any], which: str) -> None:
    pair = Pair(which, settings)
    for step in range(4):
        pair.backward()
        pair.step()
        states = pair.optimizer.state[pair.parameter]
        with torch.no_grad():
            pair.parameter.add_(0.01 * step)
            states["exp_avg"].mul_(-0.5)
            states["exp_avg_sq"].add_(1e-3)
        with pair.engine.gather("0.*", write=True) as parameters:
            host = parameters[NAME]
            torch.testing.assert_close(host.states["exp_avg"] * -0.5, states["exp_avg"], rtol=1e-3, atol=1e-6)
            host.value.add_(0.01 * step)
            host.states["exp_avg"].mul_(-0.5)
            host.states["exp_avg_sq"].add_(1e-3)
    pair.backward()
    pair.step()
    pair.close(kit)


@pytest.mark.parametrize("which", SPECS)
def test_edits_in_the_middle_of_a_step(kit: SimpleNamespace, settings: dict[str, Any], which: str) -> None:
    """Moments edited between backward and step hold for that step; the accumulated gradient is left as it is."""
    pair = Pair(which, settings)
    pair.backward()
    pair.step()
    pair.backward()
    pair.optimizer.state[pair.parameter]["exp_avg"].zero_()
    with pair.engine.gather(NAME, write=True) as parameters:
        parameters[NAME].states["exp_avg"].zero_()
    pair.step()
    pair.close(kit)


def test_edited_average(kit: SimpleNamespace, settings: dict[str, Any]) -> None:
    pair = Pair("adamw", settings)
    pair.backward()
    pair.step()
    with pair.engine.gather(NAME, write=True) as parameters:
        parameters[NAME].states["ema"].fill_(2.0)
    pair.backward()
    pair.step()
    host = kit.state_of(pair.engine)[NAME]
    twos = torch.full_like(host.value, 2.0)
    assert kit.bits(host.states["ema"]) == kit.bits(twos - (twos - host.value) * (1.0 - 0.9))
    pair.close(kit)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_16_bit_gradient_is_edited_in_its_own_dtype(kit: SimpleNamespace, dtype: torch.dtype) -> None:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.to(dtype)).float()

    name = f"inner.{NAME}"
    with OffloadEngine(Cast(), AdamW(lr=LR), OffloadConfig(dtype=dtype, loss_scale=128.0)) as engine:
        engine.backward(loss_of(engine, 0))
        with engine.gather(name, write=True) as parameters:
            shown = parameters[name].grad
            assert shown is not None
            exact = (shown * 128.0).to(dtype).float() / 128.0
            assert kit.bits(shown) == kit.bits(exact)
            shown.fill_(0.25)
        engine.step()
        assert float(kit.state_of(engine)[name].states["exp_avg"].max()) == pytest.approx(0.025, rel=1e-6)


def test_unknown_states_are_refused(kit: SimpleNamespace, tmp_path: Path) -> None:
    with OffloadEngine(make(), AdamW(lr=LR), OffloadConfig(dtype=torch.float32)) as engine:
        before = kit.state_of(engine)
        message = r"'0.weight' was given the state 'momentum'; this run keeps \['exp_avg', 'exp_avg_sq'\]"
        with pytest.raises(KeyError, match=message), engine.gather(NAME, write=True) as parameters:
            parameters[NAME].states["momentum"] = torch.zeros(12, 6)
        kit.assert_same_state(kit.state_of(engine), before)


def test_other_shapes_are_refused(kit: SimpleNamespace) -> None:
    """Also in the last of several units: nothing is written then."""
    with OffloadEngine(make(), AdamW(lr=LR), OffloadConfig(dtype=torch.float32)) as engine:
        before = kit.state_of(engine)
        for what, edit in (
            ("value", lambda host: setattr(host, "value", torch.zeros(7))),
            ("exp_avg", lambda host: host.states.update(exp_avg=torch.zeros(1, 7, 1))),
            ("grad", lambda host: setattr(host, "grad", torch.zeros(7, 1))),
        ):
            message = rf"{what} of '4.weight' was given shape \(.*\), it is \(1, 7\)"
            with pytest.raises(ValueError, match=message), engine.gather("*.weight", write=True) as parameters:
                parameters[NAME].value.add_(1.0)
                edit(parameters["4.weight"])
        kit.assert_same_state(kit.state_of(engine), before)


DOORS: dict[str, Callable[[OffloadEngine, dict[str, Any], dict[str, Any]], object]] = {
    "load_state_dict": lambda engine, values, states: engine.load_state_dict(values),
    "optimizer.load_state_dict": lambda engine, values, states: engine.optimizer.load_state_dict(states),
    "gather": lambda engine, values, states: add_ones(engine),
}


def add_ones(engine: OffloadEngine) -> None:
    with engine.gather("*", write=True) as parameters:
        for host in parameters.values():
            host.value.add_(1.0)


def step_once(engine: OffloadEngine, number: int) -> None:
    engine.backward(loss_of(engine, number))
    engine.step()


@pytest.mark.parametrize("method", ["read", "write"])
@pytest.mark.parametrize("door", DOORS)
def test_a_write_that_breaks_off_is_no_step(
    kit: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, door: str, method: str
) -> None:
    """In the third unit: the engine refuses work, and the store keeps the step before. In the first read: all is as
    it was."""
    config: dict[str, Any] = {"dtype": torch.float32, "nvme": tmp_path}
    engine = OffloadEngine(make(), AdamW(lr=LR), OffloadConfig(**config))
    step_once(engine, 0)
    engine.load_state_dict(engine.state_dict())  # that this one wrote says nothing of the next
    engine.flush()
    before = kit.state_of(engine)
    values = {name: value + 1 for name, value in engine.state_dict().items()}
    states = engine.optimizer.state_dict()
    for state in states["state"].values():
        state["exp_avg"].add_(1.0)
    original = getattr(ParameterAccess, method)

    def attempt(failing: int) -> None:
        calls: list[object] = []

        def fail(*args: Any, **kwargs: Any) -> Any:
            calls.append(args)
            if len(calls) == failing:
                raise OSError(5, "no more")
            return original(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(ParameterAccess, method, fail)
            with pytest.raises(OSError, match="no more"):
                DOORS[door](engine, values, states)

    if method == "read":
        attempt(1)
        kit.assert_same_state(kit.state_of(engine), before)
    if (door, method) == ("gather", "read"):  # all units are read before any is written
        attempt(3)
        kit.assert_same_state(kit.state_of(engine), before)
        step_once(engine, 1)
        engine.close()
        return
    attempt(3)
    with pytest.raises(RuntimeError, match=r"no more.*two different steps"):
        step_once(engine, 1)
    engine.close()
    with OffloadEngine(make(), AdamW(lr=LR), OffloadConfig(resume=True, **config)) as engine:
        kit.assert_same_state(kit.state_of(engine), before)


@pytest.mark.parametrize("door", ["load_state_dict", "optimizer.load_state_dict"])
def test_state_dicts_loaded_before_the_step_is_decided(kit: SimpleNamespace, tmp_path: Path, door: str) -> None:
    """The rest of each unit is that of the last step, not of the update that has begun in backward."""
    config = OffloadConfig(dtype=torch.float32, nvme=tmp_path, homes=kit.ALL_NVME, update="speculative")
    with OffloadEngine(make(), AdamW(lr=LR), config) as engine:
        for number in range(3):
            step_once(engine, number)
        before, values, states = kit.state_of(engine), engine.state_dict(), engine.optimizer.state_dict()
        engine.backward(loss_of(engine, 3))
        engine._gradients.wait()
        assert engine._early is not None and engine._early.has_begun
        DOORS[door](engine, values, states)
        engine.optimizer.zero_grad()
        kit.assert_same_state(kit.state_of(engine), before)
