"""`TorchOptimizer`: classes of `torch.optim` over staged units, with the bits of plain torch where all is fp32."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from offload import AdamW, BudgetTooSmall, OffloadConfig, OffloadEngine, TorchOptimizer
from offload.layout import StateSlot
from offload.torch_optimizer import PROBE_NUMEL
from offload.units import ParameterInfo

OPTIM = torch.optim
CLASSES: dict[str, tuple[type[OPTIM.Optimizer], dict[str, Any]]] = {
    "NAdam": (OPTIM.NAdam, {"lr": 1e-2, "weight_decay": 0.01}),
    "RAdam": (OPTIM.RAdam, {"lr": 1e-2}),
    "Adafactor": (OPTIM.Adafactor, {"lr": 1e-2}),
    "Adagrad": (OPTIM.Adagrad, {"lr": 1e-2, "lr_decay": 0.1, "initial_accumulator_value": 0.1}),
    "RMSprop": (OPTIM.RMSprop, {"lr": 1e-3, "momentum": 0.5, "centered": True}),
    "Adadelta": (OPTIM.Adadelta, {"lr": 1.0}),
    "ASGD": (OPTIM.ASGD, {"lr": 1e-2, "t0": 2.0}),
    "Adamax": (OPTIM.Adamax, {"lr": 1e-2}),
    "Rprop": (OPTIM.Rprop, {"lr": 1e-3}),
    "SGD": (OPTIM.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "SGD without states": (OPTIM.SGD, {"lr": 0.1}),
    "AdamW amsgrad": (OPTIM.AdamW, {"lr": 1e-2, "amsgrad": True}),
    "Adam": (OPTIM.Adam, {"lr": 1e-2, "maximize": True}),
}
ALL_NVME = {"param": "nvme", "states": "nvme", "grad": "nvme"}
FP32 = torch.float32


def make(bias: bool = True) -> nn.Module:
    torch.manual_seed(6)
    return nn.Sequential(
        nn.Linear(6, 12, bias=bias), nn.Tanh(), nn.Linear(12, 7, bias=bias), nn.Tanh(), nn.Linear(7, 1, bias=bias)
    )


def loss_of(call: Any, step: int) -> Tensor:
    return (call(torch.randn(5, 6, generator=torch.Generator().manual_seed(step))).float() - 1.0).square().mean()


def train_plain(
    plain: nn.Module, optimizer: OPTIM.Optimizer, num_steps: int = 5, clip: float | None = None
) -> dict[str, Tensor]:
    for step in range(num_steps):
        loss_of(plain, step).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(plain.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in plain.named_parameters()}


def train(engine: OffloadEngine, steps: range = range(5)) -> None:
    for step in steps:
        engine.backward(loss_of(engine, step))
        engine.step()


@pytest.mark.parametrize("name", CLASSES)
def test_bits_of_plain_torch(kit: SimpleNamespace, settings: dict[str, Any], name: str) -> None:
    kind, arguments = CLASSES[name]
    plain = make()
    optimizer = kind(plain.parameters(), **arguments)
    expected = train_plain(plain, optimizer)
    config = OffloadConfig(dtype=FP32, **settings)
    with OffloadEngine(make(), TorchOptimizer(kind, **arguments), config) as engine:
        train(engine)
        state = kit.state_of(engine)
        for (parameter_name, value), parameter in zip(expected.items(), plain.parameters(), strict=True):
            host = state[parameter_name]
            assert kit.bits(host.value) == kit.bits(value), parameter_name
            assert host.step == 5
            torchs = {k: v for k, v in optimizer.state[parameter].items() if isinstance(v, Tensor)}
            assert host.states.keys() == torchs.keys()
            for kind_name, one in torchs.items():
                assert host.states[kind_name].shape == one.shape and host.states[kind_name].dtype == one.dtype
                assert kit.bits(host.states[kind_name]) == kit.bits(one), (parameter_name, kind_name)
        assert_same_state_dict(kit, engine.optimizer.state_dict(), optimizer.state_dict())


def assert_same_state_dict(kit: SimpleNamespace, ours: dict[str, Any], torchs: dict[str, Any]) -> None:
    for index, states in torchs["state"].items():
        for name, value in states.items():
            if isinstance(value, Tensor):
                assert kit.bits(ours["state"][index][name]) == kit.bits(value)


@pytest.mark.skipif(not hasattr(OPTIM, "Muon"), reason="this torch has no Muon")
def test_muon(kit: SimpleNamespace) -> None:
    plain = make(bias=False)
    expected = train_plain(plain, OPTIM.Muon(plain.parameters(), lr=1e-2))
    with OffloadEngine(make(bias=False), TorchOptimizer(OPTIM.Muon, lr=1e-2), OffloadConfig(dtype=FP32)) as engine:
        train(engine)
        for name, value in expected.items():
            assert kit.bits(kit.state_of(engine)[name].value) == kit.bits(value)
    with pytest.raises(ValueError, match=r"Muon cannot train '0.bias' of shape \(12,\): .*; freeze it before wrapping"):
        OffloadEngine(make(), TorchOptimizer(OPTIM.Muon, lr=1e-2), OffloadConfig(dtype=FP32))


def test_clipping_groups_and_schedules(kit: SimpleNamespace) -> None:
    plain = make()
    named = dict(plain.named_parameters())
    decayed = [p for name, p in named.items() if name.endswith("weight")]
    others = [p for name, p in named.items() if name.endswith("bias")]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "lr": 3e-3}]
    optimizer = OPTIM.NAdam(groups, lr=1e-2)
    schedule = lr_scheduler.StepLR(optimizer, 2, 0.5)
    for step in range(5):
        loss_of(plain, step).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.3)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()

    def rule(name: str, parameter: nn.Parameter) -> dict[str, Any]:
        return {"weight_decay": 0.1} if name.endswith("weight") else {"lr": 3e-3}

    spec = TorchOptimizer(OPTIM.NAdam, lr=1e-2, groups=rule)
    with OffloadEngine(make(), spec, OffloadConfig(dtype=FP32, clip_grad_norm=0.3)) as engine:
        mine = lr_scheduler.StepLR(engine.optimizer, 2, 0.5)
        for step in range(5):
            engine.backward(loss_of(engine, step))
            engine.step()
            mine.step()
        values = {name: host.value for name, host in kit.state_of(engine).items()}
        expected = {name: p.detach() for name, p in named.items()}
        start = {name: p.detach() for name, p in make().named_parameters()}
        assert kit.relative_difference(values, expected, start) <= 1e-5  # the norm is summed in another order


PLACEMENTS: dict[str, dict[str, Any]] = {
    "host": {},
    "nvme": {"nvme": True, "homes": ALL_NVME},
    "nvme, small": {"nvme": True, "homes": ALL_NVME, "host_memory": "256KiB"},
    "fake": {"device": "fake", "device_memory": "1MiB"},
    "backward": {"nvme": True, "update": "backward"},
    "speculative": {"nvme": True, "update": "speculative"},
    "step": {"update": "step"},
}


@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_same_bits_for_every_placement_and_update_mode(
    kit: SimpleNamespace, tmp_path: Path, dtype: torch.dtype, micro_batches: int
) -> None:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.to(dtype))

    ends: list[Any] = []
    for name, placement in PLACEMENTS.items():
        chosen = dict(placement)
        if chosen.pop("nvme", False):
            chosen["nvme"] = tmp_path / name.replace(",", "").replace(" ", "-")
        config = OffloadConfig(dtype=dtype, micro_batches=micro_batches, **chosen)
        with OffloadEngine(Cast(), TorchOptimizer(OPTIM.Adafactor, lr=1e-2), config) as engine:
            for step in range(4):
                for micro_batch in range(micro_batches):
                    engine.backward(loss_of(engine, step * micro_batches + micro_batch))
                engine.step()
            ends.append(kit.state_of(engine))
            kit.assert_same_state(ends[-1], ends[0])
            for parameter_name, weight in engine.module.state_dict().items():
                assert kit.bits(weight) == kit.bits(ends[0][parameter_name].value.to(dtype))


def test_resume(kit: SimpleNamespace, tmp_path: Path) -> None:
    spec = TorchOptimizer(OPTIM.NAdam, lr=1e-2)
    with OffloadEngine(make(), spec, OffloadConfig(dtype=FP32)) as engine:
        train(engine, range(6))
        expected = kit.state_of(engine)
    with OffloadEngine(make(), spec, OffloadConfig(dtype=FP32, nvme=tmp_path)) as engine:
        train(engine, range(3))
    with OffloadEngine(make(), spec, OffloadConfig(dtype=FP32, nvme=tmp_path, resume=True)) as engine:
        train(engine, range(3, 6))
        kit.assert_same_state(kit.state_of(engine), expected)
    with pytest.raises(ValueError, match=r"optimizer|NAdam"):
        other = TorchOptimizer(OPTIM.RAdam, lr=1e-2)
        OffloadEngine(make(), other, OffloadConfig(dtype=FP32, nvme=tmp_path, resume=True))


@pytest.mark.parametrize("name", ["NAdam", "Adafactor", "SGD", "AdamW amsgrad"])
def test_state_dicts_of_torch(kit: SimpleNamespace, name: str) -> None:
    """Training begun in plain torch goes on in the engine, and what the engine gives goes on there."""
    kind, arguments = CLASSES[name]
    plain = make()
    optimizer = kind(plain.parameters(), **arguments)
    train_plain(plain, optimizer, 3)
    with OffloadEngine(make(), TorchOptimizer(kind, **arguments), OffloadConfig(dtype=FP32, ema_decay=0.9)) as engine:
        engine.load_state_dict(plain.state_dict())
        engine.optimizer.load_state_dict(optimizer.state_dict())
        for step in range(2):  # the data of `train_plain`
            engine.backward(loss_of(engine, step))
            engine.step()
        weights, states = engine.state_dict(), engine.optimizer.state_dict()
    train_plain(plain, optimizer, 2)
    for parameter_name, parameter in plain.named_parameters():
        assert kit.bits(weights[parameter_name]) == kit.bits(parameter)
    again = make()
    again.load_state_dict(weights)
    other = kind(again.parameters(), **arguments)
    other.load_state_dict(states)
    train_plain(again, other, 2)
    train_plain(plain, optimizer, 2)
    for one, parameter in zip(again.parameters(), plain.parameters(), strict=True):
        assert kit.bits(one) == kit.bits(parameter)


def test_parameters_without_a_gradient_do_not_age(kit: SimpleNamespace) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.branches = nn.ModuleList(nn.Linear(6, 1) for _ in range(2))

        def forward(self, x: Tensor, branch: int) -> Tensor:
            return self.branches[branch](x)

    plain = Branches()
    wrapped = copy.deepcopy(plain)
    optimizer = OPTIM.Adagrad(plain.parameters(), lr=1e-2)
    with OffloadEngine(wrapped, TorchOptimizer(OPTIM.Adagrad, lr=1e-2), OffloadConfig(dtype=FP32)) as engine:
        for step, branch in enumerate((0, 0, 1, 0, 1)):
            loss_of(lambda x, b=branch: plain(x, b), step).backward()
            optimizer.step()
            optimizer.zero_grad()
            engine.backward(loss_of(lambda x, b=branch: engine(x, b), step))
            engine.step()
        for name, parameter in plain.named_parameters():
            assert kit.bits(kit.state_of(engine)[name].value) == kit.bits(parameter)


# -- states


def info_of(shape: tuple[int, ...]) -> ParameterInfo:
    parameter = nn.Parameter(torch.empty(0))
    return ParameterInfo(parameter, ("p",), FP32, torch.Size(shape), True)


@pytest.mark.parametrize("shape", [(3, 5), (1, 7), (9,), (2, 3, 4, 5), (1,)])
def test_slots_have_the_shapes_that_the_class_leaves(shape: tuple[int, ...]) -> None:
    for kind, arguments in CLASSES.values():
        info = info_of(shape)
        slots = {slot.name: slot for slot in TorchOptimizer(kind, **arguments).slots([info])[info.parameter]}
        parameter = nn.Parameter(torch.randn(shape))
        optimizer = kind([parameter], **arguments)
        parameter.grad = torch.randn(shape)
        optimizer.step()
        left = {name: state for name, state in optimizer.state[parameter].items() if isinstance(state, Tensor)}
        assert {n: (s.shape, s.dtype) for n, s in slots.items()} == {n: (s.shape, s.dtype) for n, s in left.items()}


def test_slots_of_a_large_parameter_follow_from_a_small_one() -> None:
    """Nothing as large as the parameter is made to find them."""
    info = info_of((151_936, 1, 5120))
    assert info.numel > PROBE_NUMEL
    slots = TorchOptimizer(OPTIM.Adafactor).slots([info])[info.parameter]
    assert {slot.name: tuple(slot.shape) for slot in slots} == {
        "step": (),
        "row_var": (151_936, 1, 1),
        "col_var": (151_936, 1, 5120),
    }
    square = info_of((4096, 4096))
    slots = TorchOptimizer(OPTIM.AdamW).slots([square])[square.parameter]
    assert StateSlot("exp_avg", torch.Size((4096, 4096)), FP32) in slots


class WithNumbers(OPTIM.Optimizer):
    """Momentum, with a count that is an int, a factor that is a float, and a state that is None."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state.update(count=0, factor=1.0, spare=None, buffer=torch.zeros_like(parameter))
                assert type(state["count"]) is int and type(state["factor"]) is float and state["spare"] is None
                state["count"] += 1
                state["factor"] *= 0.9
                state["buffer"] = state["buffer"] * state["factor"] + parameter.grad
                parameter.sub_(state["buffer"] * group["lr"] / state["count"])


def test_states_that_are_numbers(kit: SimpleNamespace) -> None:
    plain = make()
    expected = train_plain(plain, WithNumbers(plain.parameters()))
    with OffloadEngine(make(), TorchOptimizer(WithNumbers), OffloadConfig(dtype=FP32)) as engine:
        train(engine)
        for name, value in expected.items():
            assert kit.bits(kit.state_of(engine)[name].value) == kit.bits(value)


# -- what cannot work


class OverAll(OPTIM.Optimizer):
    """Divides by the norm over all parameters."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        parameters = [p for group in self.param_groups for p in group["params"]]
        norm = sum(p.grad.square().sum() for p in parameters) ** 0.5
        for parameter in parameters:
            parameter.sub_(parameter.grad * self.param_groups[0]["lr"] / norm)


class CountsItself(OverAll):
    """Keeps a count in the instance."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.count = getattr(self, "count", 0) + 1
        for parameter in self.param_groups[0]["params"]:
            parameter.sub_(parameter.grad * self.param_groups[0]["lr"] / self.count)


class Noisy(OverAll):
    """Adds noise."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.sub_((parameter.grad + torch.randn_like(parameter)) * self.param_groups[0]["lr"])


@pytest.mark.parametrize("kind", [OverAll, CountsItself, Noisy])
def test_classes_that_do_not_step_each_parameter_by_itself(kind: type[OPTIM.Optimizer]) -> None:
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=rf"{kind.__name__} does not step each parameter by itself.*AdamW, Adam, SGD"):
        TorchOptimizer(kind)
    assert torch.equal(torch.get_rng_state(), before)


def test_classes_that_need_more_than_a_gradient() -> None:
    with pytest.raises(ValueError, match=r"LBFGS cannot step over one parameter after the other.*closure"):
        TorchOptimizer(OPTIM.LBFGS)
    with pytest.raises(ValueError, match=r"SparseAdam cannot step over one parameter after the other with dense"):
        TorchOptimizer(OPTIM.SparseAdam)


def test_arguments_that_cannot_work() -> None:
    with pytest.raises(ValueError, match=r"give a class of torch.optim and its settings"):
        TorchOptimizer(AdamW)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"NAdam cannot be made with {'learning_rate': 1}"):
        TorchOptimizer(OPTIM.NAdam, learning_rate=1)
    with pytest.raises(ValueError, match=r"NAdam cannot be made with {'lr': -1.0}: Invalid learning rate"):
        TorchOptimizer(OPTIM.NAdam, lr=-1.0)
    groups = [{"params": [name for name, _ in make().named_parameters()], "momentum": 0.1}]
    with pytest.raises(ValueError, match=r"NAdam has no setting 'momentum'; it has lr"):
        OffloadEngine(make(), TorchOptimizer(OPTIM.NAdam, groups=groups), OffloadConfig(dtype=FP32))
    with pytest.raises(ValueError, match=r"give offload.TorchOptimizer\(torch.optim.NAdam, lr=...\)"):
        OffloadEngine(make(), OPTIM.NAdam, OffloadConfig(dtype=FP32))  # type: ignore[arg-type]


def test_hyperparameters_out_of_range_are_refused_at_the_step() -> None:
    with OffloadEngine(make(), TorchOptimizer(OPTIM.NAdam), OffloadConfig(dtype=FP32)) as engine:
        engine.backward(loss_of(engine, 0))
        engine.optimizer.param_groups[0]["lr"] = -1.0
        with pytest.raises(ValueError, match=r"Invalid learning rate: -1.0"):
            engine.step()


def test_updates_on_the_device_are_refused() -> None:
    config = OffloadConfig(dtype=FP32, device="fake", device_memory="16MiB", update_on="device")
    with pytest.raises(ValueError, match=r"steps over whole parameters in host memory; leave update_on=\"host\""):
        OffloadEngine(make(), TorchOptimizer(OPTIM.NAdam), config)


def test_a_budget_counts_whole_units(tmp_path: Path) -> None:
    """One unit's param, states and gradient at once: 4 + 8 + 4 bytes per element, and the budget that a refusal names
    is kept to."""
    model = nn.Sequential(*(nn.Linear(600, 600, bias=False) for _ in range(3)))
    spec = TorchOptimizer(OPTIM.NAdam)
    settings: dict[str, Any] = {"dtype": FP32, "nvme": tmp_path, "homes": ALL_NVME}
    with pytest.raises(BudgetTooSmall, match=r"smallest host_memory that works is") as refusal:
        OffloadEngine(copy.deepcopy(model), spec, OffloadConfig(host_memory="1MiB", **settings))
    needed = refusal.value.needed_nbytes
    assert needed >= 600 * 600 * (4 + 8 + 4) + 600 * 600 * 4
    with OffloadEngine(model, spec, OffloadConfig(host_memory=needed, **settings)) as engine:
        for step in range(2):
            x = torch.randn(2, 600, generator=torch.Generator().manual_seed(step))
            engine.backward(engine(x).square().mean())
            engine.step()
        engine.flush()
        assert engine.memory.host_peak_nbytes <= needed
