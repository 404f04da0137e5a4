"""Hooks on gradients are called as plain torch calls them: once per backward, with the whole gradient."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offload import SGD, OffloadConfig, OffloadEngine


class Shared(nn.Module):
    """One unit is called twice, one parameter is read by the root: their gradients come in parts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 6))
        self.last = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.block(x) * self.scale) * self.scale
        return self.last(x).square().sum()


X = torch.linspace(-1, 1, 18).reshape(3, 6)
NAMES = ("block.0.weight", "scale", "last.bias")


def both(
    kit: SimpleNamespace, settings: dict[str, Any], prepare: Callable[[nn.Module], Any], before: bool, steps: int = 2
) -> tuple[Any, Any]:
    """Train plain and wrapped; `prepare(model)` registers hooks. Requires equal values; returns what prepare gave."""
    plain = Shared()
    seen = prepare(plain)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for _ in range(steps):
        plain(X).backward()
        optimizer.step()
        optimizer.zero_grad()
    model = Shared()
    ours = prepare(model) if before else None
    with OffloadEngine(model, SGD(lr=0.1), OffloadConfig(dtype=torch.float32, **settings)) as engine:
        if not before:
            ours = prepare(model)
        for _ in range(steps):
            engine.backward(engine(X))
            engine.step()
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(engine.state_dict()[name], value, rtol=1e-5, atol=1e-6, msg=name)
    return seen, ours


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_a_hook_that_clamps_sees_the_sum(kit: SimpleNamespace, settings: dict[str, Any], before: bool) -> None:
    """Clamping parts of a sum gives other numbers than clamping the sum."""

    def prepare(model: nn.Module) -> list[float]:
        norms: list[float] = []

        def clamp(gradient: Tensor) -> Tensor:
            norms.append(float(gradient.norm()))
            return gradient.clamp(-0.05, 0.05)

        for name in NAMES:
            model.get_parameter(name).register_hook(clamp)
        return norms

    theirs, ours = both(kit, settings, prepare, before)
    assert len(theirs) == 2 * len(NAMES)
    assert sorted(ours) == pytest.approx(sorted(theirs), rel=1e-5)


def test_a_hook_may_look_at_its_parameter(kit: SimpleNamespace, settings: dict[str, Any]) -> None:
    def prepare(model: nn.Module) -> None:
        for name in NAMES:
            parameter = model.get_parameter(name)
            dict.__getitem__(model._parameters, "scale")
            parameter.register_hook(lambda gradient, parameter=parameter: gradient + 0.1 * parameter.detach())

    both(kit, settings, prepare, before=False)


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_hooks_behind_the_accumulation(kit: SimpleNamespace, settings: dict[str, Any], before: bool) -> None:
    """They see the gradient in `grad`, may edit and replace it, and take it away."""

    def prepare(model: nn.Module) -> list[float]:
        seen: list[float] = []

        def edit(parameter: nn.Parameter) -> None:
            seen.append(float(parameter.grad.norm()))
            parameter.grad.mul_(0.5)

        def replace(parameter: nn.Parameter) -> None:
            parameter.grad = parameter.grad.sign()

        def take_away(parameter: nn.Parameter) -> None:
            parameter.grad = None

        model.get_parameter("block.0.weight").register_post_accumulate_grad_hook(edit)
        model.get_parameter("scale").register_post_accumulate_grad_hook(replace)
        model.get_parameter("last.bias").register_post_accumulate_grad_hook(take_away)
        return seen

    theirs, ours = both(kit, settings, prepare, before)
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_handles_remove_hooks_from_before_and_after(settings: dict[str, Any]) -> None:
    model, calls = Shared(), []
    parameter = model.scale
    handles = [
        parameter.register_hook(lambda gradient: calls.append("before")),
        parameter.register_post_accumulate_grad_hook(lambda p: calls.append("before, behind")),
    ]
    with OffloadEngine(model, SGD(lr=0.1), OffloadConfig(dtype=torch.float32, **settings)) as engine:
        handles += [
            parameter.register_hook(lambda gradient: calls.append("after")),
            parameter.register_post_accumulate_grad_hook(lambda p: calls.append("after, behind")),
        ]
        engine.backward(engine(X))
        engine.step()
        assert calls == ["before", "after", "before, behind", "after, behind"]
        for handle in handles:
            handle.remove()
        engine.backward(engine(X))
        engine.step()
        assert len(calls) == 4


def test_hooks_of_several_backwards_see_each_ones_gradient(settings: dict[str, Any]) -> None:
    def norms(model: nn.Module) -> list[float]:
        seen: list[float] = []
        model.get_parameter("block.0.weight").register_hook(lambda gradient: seen.append(float(gradient.norm())))
        return seen

    plain = Shared()
    theirs = norms(plain)
    for x in (X, 2 * X):
        plain(x).backward()
    model = Shared()
    with OffloadEngine(model, SGD(lr=0.1), OffloadConfig(dtype=torch.float32, micro_batches=2, **settings)) as engine:
        ours = norms(model)
        for x in (X, 2 * X):
            engine.backward(engine(x))
        engine.step()
        assert ours == pytest.approx(theirs, rel=1e-5)
        model.scale.register_post_accumulate_grad_hook(lambda parameter: None)
        with pytest.raises(RuntimeError, match=r"micro_batches=2: the hook would see one.*register_hook"):
            engine.backward(engine(X))


def test_a_hook_that_changes_the_shape_is_refused(settings: dict[str, Any]) -> None:
    model = Shared()
    with OffloadEngine(model, SGD(lr=0.1), OffloadConfig(dtype=torch.float32, **settings)) as engine:
        handle = model.scale.register_hook(lambda gradient: gradient[:1])
        with pytest.raises(RuntimeError, match=r"a gradient hook gave .*\(1,\) for a gradient of .*\(6,\)"):
            engine.backward(engine(X))
        handle.remove()
        engine.optimizer.zero_grad()
        engine.backward(engine(X))
        engine.step()


def test_hooks_are_torchs_again_when_construction_fails(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = Shared(), []
    model.scale.register_hook(lambda gradient: calls.append(1))

    def fail(engine: OffloadEngine) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(OffloadEngine, "_begin_commits", fail)
    with pytest.raises(ZeroDivisionError):
        OffloadEngine(model, SGD(lr=0.1), OffloadConfig(device="cpu", dtype=torch.float32))
    model.scale.register_hook(lambda gradient: calls.append(2))
    model(X).backward()
    assert calls == [1, 2]
    assert "register_hook" not in vars(model.scale)


@pytest.mark.parametrize("where", ["", "block", "block.0", "last"])
def test_module_hooks_on_backward(kit: SimpleNamespace, settings: dict[str, Any], where: str) -> None:
    """On the whole module, on a unit and inside of one; they see and may replace gradients."""

    def prepare(model: nn.Module) -> list[float]:
        seen: list[float] = []

        def hook(part: nn.Module, given: Any, got: Any) -> Any:
            seen.append(float(got[0].norm()))
            return tuple(None if gradient is None else 0.5 * gradient for gradient in given) if where else None

        model.get_submodule(where).register_full_backward_hook(hook)
        return seen

    x = X.clone().requires_grad_()
    plain, model = Shared(), Shared()
    theirs = prepare(plain)
    plain(x).backward()
    expected = {name: p.grad for name, p in plain.named_parameters()}
    with OffloadEngine(model, SGD(lr=0.1), OffloadConfig(dtype=torch.float32, **settings)) as engine:
        ours = prepare(model)
        engine.backward(engine(x))
        assert ours == pytest.approx(theirs, rel=1e-5)
        with engine.gather("*") as parameters:
            for name, gradient in expected.items():
                torch.testing.assert_close(parameters[name].grad, gradient, rtol=1e-5, atol=1e-6)
