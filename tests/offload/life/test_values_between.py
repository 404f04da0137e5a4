"""Values and gradients that change between a forward and its backward, or before `step()`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offload import SGD, OffloadConfig, OffloadEngine, PlaceholderOverwritten


class Net(nn.Module):
    """Two units, and a parameter that the root computes with."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 4))
        self.second = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) * self.scale).square().sum()


X = torch.linspace(-1, 1, 12).reshape(3, 4)


@pytest.fixture
def engine(settings: dict[str, Any]) -> Any:
    with OffloadEngine(Net(), SGD(lr=0.1), OffloadConfig(dtype=torch.float32, micro_batches=2, **settings)) as engine:
        yield engine


def load(engine: OffloadEngine) -> None:
    engine.load_state_dict({name: 2 * value for name, value in engine.state_dict().items()})


def edit(name: str) -> Callable[[OffloadEngine], None]:
    def do(engine: OffloadEngine) -> None:
        with engine.gather(name, write=True) as parameters:
            for host in parameters.values():
                host.value.mul_(2)

    return do


CHANGES = {"load": load, "unit": edit("first.*"), "touched": edit("scale")}


@pytest.mark.parametrize("kept", [{}, {"activation_memory": 0}], ids=["kept", "recomputed"])
@pytest.mark.parametrize("change", CHANGES)
def test_backward_after_the_values_changed_is_refused(
    settings: dict[str, Any], change: str, kept: dict[str, Any]
) -> None:
    """Torch refuses it too. Dropped, everything goes on with the new values."""
    with OffloadEngine(Net(), SGD(lr=0.1), OffloadConfig(dtype=torch.float32, **settings, **kept)) as engine:
        for _ in range(2):  # a kept graph is one of a call whose size is known
            loss = engine(X)
            engine.optimizer.zero_grad()
        CHANGES[change](engine)
        with pytest.raises(RuntimeError, match=r"were changed since this forward.*run forward again|inplace operation"):
            engine.backward(loss)
        engine.optimizer.zero_grad()
        engine.backward(engine(X))
        engine.step()
        plain = Net()
        with torch.no_grad():
            for name, parameter in plain.named_parameters():
                if change == "load" or name.startswith({"unit": "first.", "touched": "scale"}[change]):
                    parameter.mul_(2)
        optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
        plain(X).backward()
        optimizer.step()
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(engine.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_edited_gradients_leave_a_forward_usable(engine: OffloadEngine) -> None:
    """Nothing that forward computed with has changed."""
    plain = Net()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    first, second = plain.first(X).sum(), plain.first(2 * X).sum()
    first.backward()
    plain.first[0].weight.grad.mul_(0.5)
    second.backward()
    optimizer.step()
    first, second = engine.module.first(X).sum(), engine.module.first(2 * X).sum()
    engine.backward(first)
    with engine.gather("first.0.weight", write=True) as parameters:
        parameters["first.0.weight"].grad.mul_(0.5)
    engine.backward(second)
    engine.step()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(engine.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_backward_of_what_the_root_computed_before_a_step_is_refused(settings: dict[str, Any]) -> None:
    """The copy that its graph saved is gone; without a word, NaN would come of it."""
    with OffloadEngine(Net(), SGD(lr=0.1), OffloadConfig(dtype=torch.float32, **settings)) as engine:
        model = engine.module
        stale = (model.scale * X.clone().requires_grad_()).square().sum()
        engine.backward(engine(X))
        engine.step()
        with pytest.raises(RuntimeError, match=r"modified by an inplace operation"):
            engine.backward(stale)


def test_backward_after_clipping_is_refused(engine: OffloadEngine) -> None:
    engine.backward(engine(X))
    assert float(engine.clip_grad_norm_(1e9)) < 1e9  # a factor of one falls on nothing
    engine.backward(engine(X))
    engine.step()
    loss, later = engine(X), engine(X)
    engine.backward(loss)
    engine.clip_grad_norm_(0.1)
    with pytest.raises(RuntimeError, match=r"a backward after engine.clip_grad_norm_.*clip after the last backward"):
        engine.backward(later)
    before = engine.state_dict()
    assert engine.step(partial=True).grad_norm > 0.1
    change = sum(float((before[name] - value).square().sum()) for name, value in engine.state_dict().items()) ** 0.5
    assert change == pytest.approx(0.1 * 0.1, rel=1e-3), "the accumulation is as it was before the refusal"


@pytest.mark.parametrize("value", [None, 0.0], ids=["None", "a tensor"])
@pytest.mark.parametrize("then", ["step", "backward"])
def test_gradients_set_by_hand_are_refused(engine: OffloadEngine, value: float | None, then: str) -> None:
    engine.backward(engine(X))
    parameter = next(engine.module.second.parameters())
    parameter.grad = None if value is None else torch.full_like(parameter, value)
    with pytest.raises(RuntimeError, match=r"`.grad` of 'second.weight' was set from outside.*gather.*zero_grad"):
        engine.step(partial=True) if then == "step" else engine.backward(engine(X))
    engine.optimizer.zero_grad()
    engine.backward(engine(X))
    engine.step(partial=True)


@pytest.mark.parametrize("name", ["first.0.weight", "scale"])
def test_a_gradient_set_before_the_first_backward_is_refused(engine: OffloadEngine, name: str) -> None:
    """Torch would add to it."""
    parameter = dict(engine.module.named_parameters())[name]
    parameter.grad = torch.ones_like(parameter)
    with pytest.raises(RuntimeError, match=r"was set from outside"):
        engine.backward(engine(X))


def test_an_edit_in_place_is_not_left_out_of_a_state_dict(engine: OffloadEngine, tmp_path: Path) -> None:
    with torch.no_grad():
        engine.module.first[0].weight.add_(1)
    doors: list[Callable[[], object]] = [
        engine.state_dict,
        lambda: engine.gather("*").__enter__(),
        lambda: engine.save(tmp_path / "run"),
        lambda: engine.save_pretrained(tmp_path / "weights"),
    ]
    for look in doors:
        with pytest.raises(PlaceholderOverwritten, match=r"'first.0.weight' was edited in place.*engine.gather"):
            look()


def test_zero_grad_of_a_part(kit: SimpleNamespace, engine: OffloadEngine) -> None:
    engine.backward(engine(X))
    with pytest.raises(RuntimeError, match=r"zero_grad\(\) on Linear, a part of the wrapped module, is refused"):
        engine.module.second.zero_grad()
    engine.module.first[1].zero_grad()  # no parameters, nothing to drop
    assert all(host.grad is not None for host in kit.state_of(engine).values())
    engine.module.zero_grad()
    assert all(host.grad is None for host in kit.state_of(engine).values())
