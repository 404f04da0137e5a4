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
