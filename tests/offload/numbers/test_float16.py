"""float16 compute: fp32 masters beside fp16 weights, and loss scales with the semantics of `torch.amp.GradScaler`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offload import SGD, AdamW, DynamicLossScale, OffloadConfig, OffloadEngine
from offload.optimizers import OptimizerSpec

HALF = torch.float16
LR = 1e-2
OVERFLOWS = 2  # the step whose loss is so large that scaled gradients are infinite in float16


class Tiny(nn.Module):
    """Two linear layers and a norm."""

    def __init__(self, dtype: torch.dtype = HALF) -> None:
        super().__init__()
        self.dtype = dtype
        torch.manual_seed(4)
        self.up = nn.Linear(12, 40)
        self.norm = nn.LayerNorm(40)
        self.down = nn.Linear(40, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.norm(self.up(x.to(self.dtype)))))


def loss_of(call: Callable[[Tensor], Tensor], step: int, overflow: int | None = OVERFLOWS) -> Tensor:
    x = torch.randn(8, 12, generator=torch.Generator().manual_seed(step))
    factor = 1e4 if step == overflow else 1.0
    return (call(x).float() - 1.0).square().mean() * factor


class Plain:
    """What the engine does, by hand: fp16 weights, fp32 masters, a GradScaler over the masters' optimizer."""

    def __init__(
        self, make_optimizer: Callable[[Any], torch.optim.Optimizer], scaler: torch.amp.GradScaler, clip: float | None
    ) -> None:
        self.model = Tiny().to(HALF)
        self.masters = [nn.Parameter(p.detach().float()) for p in Tiny().parameters()]
        with torch.no_grad():
            for weight, master in zip(self.model.parameters(), self.masters, strict=True):
                weight.copy_(master)
        self.optimizer = make_optimizer(self.masters)
        self.scaler = scaler
        self.clip = clip
        self.scales: list[float] = []
        self.losses: list[float] = []
        self.norms: list[float] = []

    def step(self, number: int, micro_batches: int = 1) -> None:
        for micro_batch in range(micro_batches):
            loss = loss_of(self.model, number * micro_batches + micro_batch, OVERFLOWS * micro_batches)
            self.scaler.scale(loss).backward()
            self.losses.append(float(loss.detach()))
            for weight, master in zip(self.model.parameters(), self.masters, strict=True):
                assert weight.grad is not None
                master.grad = weight.grad.float() if master.grad is None else master.grad + weight.grad.float()
                weight.grad = None
        self.scaler.unscale_(self.optimizer)
        self.norms.append(float(nn.utils.clip_grad_norm_(self.masters, self.clip or float("inf"))))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scales.append(self.scaler.get_scale())
        self.optimizer.zero_grad()
        with torch.no_grad():
            for weight, master in zip(self.model.parameters(), self.masters, strict=True):
                weight.copy_(master)


def assert_close(kit: SimpleNamespace, engine: OffloadEngine, plain: Plain, bound: float = 1e-4) -> None:
    """Masters within `bound` of the plain run's whole update; fp16 weights are the rounded masters."""
    names = [name for name, _ in Tiny().named_parameters()]
    start = {name: p.detach() for name, p in Tiny().named_parameters()}
    state = kit.state_of(engine)
    values = {name: state[name].value for name in names}
    masters = {name: p.detach() for name, p in zip(names, plain.masters, strict=True)}
    assert kit.relative_difference(values, masters, start) <= bound
    for name, weight in engine.module.state_dict().items():
        assert weight.dtype == HALF
        assert kit.bits(weight) == kit.bits(values[name].to(HALF))


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=LR)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


@pytest.mark.parametrize(
    ("spec", "make_optimizer"), [(AdamW(lr=LR), adamw), (SGD(lr=0.05, momentum=0.9), sgd)], ids=["adamw", "sgd"]
)
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_dynamic_scale_follows_a_grad_scaler(
    kit: SimpleNamespace,
    settings: dict[str, Any],
    spec: OptimizerSpec,
    make_optimizer: Callable[[Any], torch.optim.Optimizer],
    clip: float | None,
    micro_batches: int,
) -> None:
    rule = {"init_scale": 2.0**13, "growth_interval": 2}
    plain = Plain(make_optimizer, torch.amp.GradScaler("cpu", **rule), clip)
    config = OffloadConfig(
        dtype=HALF,
        loss_scale=DynamicLossScale(**rule),
        clip_grad_norm=clip,
        micro_batches=micro_batches,
        **settings,
    )
    with OffloadEngine(Tiny(), spec, config) as engine:
        skipped = []
        for step in range(6):
            plain.step(step, micro_batches)
            for micro_batch in range(micro_batches):
                loss = loss_of(engine, step * micro_batches + micro_batch, OVERFLOWS * micro_batches)
                engine.backward(loss)
            info = engine.step()
            skipped.append(info.skipped)
            assert engine.loss_scale == plain.scales[step]
            if not info.skipped:
                assert info.grad_norm == pytest.approx(plain.norms[step], rel=1e-4)
            elif micro_batches == 1:
                assert info.loss == pytest.approx(plain.losses[step], rel=1e-3)
        assert skipped == [step == OVERFLOWS for step in range(6)]
        assert plain.scales == [2.0**13, 2.0**14, 2.0**13, 2.0**13, 2.0**14, 2.0**14]
        assert_close(kit, engine, plain)


def test_grad_scaler_of_the_user(kit: SimpleNamespace, settings: dict[str, Any]) -> None:
    rule: dict[str, Any] = {"init_scale": 2.0**13, "growth_interval": 2}
    plain = Plain(adamw, torch.amp.GradScaler("cpu", **rule), 0.5)
    scaler = torch.amp.GradScaler("cpu", **rule)
    with OffloadEngine(Tiny(), AdamW(lr=LR), OffloadConfig(dtype=HALF, **settings)) as engine:
        for step in range(6):
            plain.step(step)
            scaler.scale(loss_of(engine, step)).backward()
            scaler.unscale_(engine.optimizer)
            norm = engine.clip_grad_norm_(0.5)
            scaler.step(engine.optimizer)
            scaler.update()
            engine.optimizer.zero_grad()
            assert scaler.get_scale() == plain.scales[step]
            if step != OVERFLOWS:
                assert float(norm) == pytest.approx(plain.norms[step], rel=1e-4)
        assert_close(kit, engine, plain)
        assert {host.step for host in kit.state_of(engine).values()} == {5}


def test_grad_scaler_without_unscale(kit: SimpleNamespace) -> None:
    """`scaler.step` unscales by itself, once."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    ends = []
    for scaled in (False, True):
        with OffloadEngine(Tiny(torch.float32), AdamW(lr=LR), OffloadConfig(dtype=torch.float32)) as engine:
            for step in range(3):
                loss = loss_of(engine, step, None)
                if scaled:
                    scaler.scale(loss).backward()
                    scaler.step(engine.optimizer)
                    scaler.update()
                else:
                    loss.backward()
                    engine.step()
            ends.append(kit.state_of(engine))
    kit.assert_same_state(*ends)


PLACEMENTS = {
    "host": {},
    "nvme": {"nvme": True, "homes": {"param": "nvme", "states": "nvme", "grad": "nvme"}},
    "fake": {"device": "fake", "device_memory": "1MiB"},
    "fake, updates there": {"device": "fake", "device_memory": "16MiB", "update_on": "device"},
    "nvme, backward": {"nvme": True, "update": "backward"},
    "nvme, speculative": {"nvme": True, "update": "speculative"},
    "nvme, auto": {"nvme": True, "update": "auto"},
    "step": {"update": "step"},
}


def run_placed(
    kit: SimpleNamespace, folder: Path, placement: str, scale: Any, micro_batches: int, overflow: int | None
) -> tuple[Any, list[Any]]:
    settings = dict(PLACEMENTS[placement])
    if settings.pop("nvme", False):
        settings["nvme"] = folder / placement.replace(",", "").replace(" ", "-")
    config = OffloadConfig(dtype=HALF, loss_scale=scale, micro_batches=micro_batches, host_memory="64MiB", **settings)
    seen: list[Any] = []
    with OffloadEngine(Tiny(), AdamW(lr=LR), config) as engine:
        for step in range(5):
            for micro_batch in range(micro_batches):
                engine.backward(loss_of(engine, step * micro_batches + micro_batch, overflow))
            info = engine.step()
            seen.append((info.grad_norm, info.skipped, engine.loss_scale))
        return kit.state_of(engine), seen


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_same_bits_for_every_placement_and_update_mode(
    kit: SimpleNamespace, tmp_path: Path, micro_batches: int
) -> None:
    dynamic = DynamicLossScale(init_scale=2.0**13, growth_interval=2)
    expected = run_placed(kit, tmp_path, "host", dynamic, micro_batches, OVERFLOWS)
    assert [skipped for _, skipped, _ in expected[1]].count(True) == 1
    for placement in PLACEMENTS:
        if placement != "nvme, backward":
            state, seen = run_placed(kit, tmp_path, placement, dynamic, micro_batches, OVERFLOWS)
            assert str(seen) == str(expected[1]), placement
            kit.assert_same_state(state, expected[0])
    fixed = run_placed(kit, tmp_path / "fixed", "host", 512.0, micro_batches, None)
    state, seen = run_placed(kit, tmp_path / "fixed", "nvme, backward", 512.0, micro_batches, None)
    assert seen == fixed[1]
    kit.assert_same_state(state, fixed[0])


def test_early_updates_assume_the_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss scale that stays as it is does not make a speculation wrong."""
    config = OffloadConfig(dtype=HALF, loss_scale=512.0, nvme=tmp_path, update="speculative")
    with OffloadEngine(Tiny(), AdamW(lr=LR), config) as engine:
        assert engine._early is not None
        taken_back: list[bool] = []
        original = engine._early.take_back
        monkeypatch.setattr(engine._early, "take_back", lambda: (taken_back.append(True), original()))
        for step in range(4):
            engine.backward(loss_of(engine, step, None))
            assert not engine.step().skipped
        assert taken_back == []


def test_turns_scale_each_loss(kit: SimpleNamespace) -> None:
    """`train_step` in turns has the bits of the plain loop, with a loss scale too."""
    batches = [torch.randn(4, 12, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]

    def loss_fn(result: Tensor, batch: Tensor) -> Tensor:
        return (result.float() - 1.0).square().mean()

    config = OffloadConfig(dtype=HALF, loss_scale=256.0, micro_batches=2)
    ends = []
    for in_turns in (True, False):
        with OffloadEngine(Tiny(), AdamW(lr=LR), config) as engine:
            for _ in range(3):
                if in_turns:
                    info = engine.train_step(batches, loss_fn)
                else:
                    for batch in batches:
                        engine.backward(loss_fn(engine(batch), batch) / 2)
                    info = engine.step()
            ends.append((kit.state_of(engine), info.loss, info.grad_norm))
    kit.assert_same_state(ends[0][0], ends[1][0])
    assert ends[0][1:] == ends[1][1:]


def train(engine: OffloadEngine, steps: Sequence[int]) -> None:
    for step in steps:
        engine.backward(loss_of(engine, step))
        engine.step()


def test_the_scale_is_part_of_a_commit(kit: SimpleNamespace, tmp_path: Path) -> None:
    common: dict[str, Any] = {"dtype": HALF, "loss_scale": DynamicLossScale(init_scale=2.0**13, growth_interval=4)}
    with OffloadEngine(Tiny(), AdamW(lr=LR), OffloadConfig(**common)) as engine:
        train(engine, range(8))
        expected = kit.state_of(engine), engine.loss_scale, engine._scaling.state_dict()
    with OffloadEngine(Tiny(), AdamW(lr=LR), OffloadConfig(nvme=tmp_path, **common)) as engine:
        train(engine, range(4))
    with OffloadEngine(Tiny(), AdamW(lr=LR), OffloadConfig(nvme=tmp_path, resume=True, **common)) as engine:
        assert engine.loss_scale == 2.0**12
        train(engine, range(4, 8))
        kit.assert_same_state(kit.state_of(engine), expected[0])
        assert (engine.loss_scale, engine._scaling.state_dict()) == expected[1:]


def test_a_tracked_grad_scaler_is_committed_after_its_update(tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3)
    with OffloadEngine(Tiny(), AdamW(lr=LR), OffloadConfig(dtype=HALF, nvme=tmp_path)) as engine:
        engine.track(scaler)
        for step in range(3):
            scaler.scale(loss_of(engine, step, None)).backward()
            scaler.step(engine.optimizer)
            scaler.update()
        assert scaler.get_scale() == 128.0
    again = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3)
    with OffloadEngine(Tiny(), AdamW(lr=LR), OffloadConfig(dtype=HALF, nvme=tmp_path, resume=True)) as engine:
        engine.track(again)
        assert again.state_dict() == scaler.state_dict()


def test_gathered_gradients_are_without_the_scale(kit: SimpleNamespace) -> None:
    shown = []
    for scale in (None, 256.0):
        with OffloadEngine(
            Tiny(torch.float32), AdamW(lr=LR), OffloadConfig(dtype=torch.float32, loss_scale=scale)
        ) as engine:
            engine.backward(loss_of(engine, 0))
            with engine.gather("up.weight", write=True) as parameters:
                gradient = parameters["up.weight"].grad
                gradient.mul_(2.0)
                shown.append(gradient.clone())
            info = engine.step()
            shown.append(torch.tensor(info.grad_norm))
            shown.append(kit.state_of(engine)["up.weight"].states["exp_avg"])
    assert all(kit.bits(one) == kit.bits(other) for one, other in zip(shown[:3], shown[3:], strict=True))


def test_masters_are_exact(kit: SimpleNamespace) -> None:
    """What no float16 can hold survives, whole, in the master."""
    model = Tiny()
    values = {name: p.detach().clone() + 1e-7 for name, p in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name])
    with OffloadEngine(model, AdamW(lr=LR), OffloadConfig(dtype=HALF)) as engine:
        state = engine.state_dict()
        for name, value in values.items():
            assert state[name].dtype == torch.float32 and kit.bits(state[name]) == kit.bits(value)
        other = copy.deepcopy(values)
        other["up.bias"] += 1e-3
        engine.load_state_dict(other)
        assert kit.bits(engine.state_dict()["up.bias"]) == kit.bits(other["up.bias"])


# -- what cannot work


def test_plain_backward_beside_a_built_in_scale() -> None:
    with OffloadEngine(Tiny(), AdamW(lr=LR), OffloadConfig(dtype=HALF, loss_scale="dynamic")) as engine:
        loss_of(engine, 0).backward()
        with pytest.raises(RuntimeError, match=r"1 of 1 backwards .* loss.backward\(\).* call engine.backward\(loss\)"):
            engine.step()
        engine.optimizer.zero_grad()
        engine.backward(loss_of(engine, 0))
        assert not engine.step().skipped


def test_grad_scaler_beside_updates_in_backward() -> None:
    """They have used the gradients, with the scale in them, before anybody can unscale."""
    scaler = torch.amp.GradScaler("cpu")
    with OffloadEngine(Tiny(), AdamW(lr=LR), OffloadConfig(dtype=HALF, update="backward")) as engine:
        scaler.scale(loss_of(engine, 0)).backward()
        with pytest.raises(RuntimeError, match=r'GradScaler .* build the engine anew with update="next_forward"'):
            scaler.unscale_(engine.optimizer)


def test_gradients_of_inputs_are_not_left_scaled() -> None:
    with OffloadEngine(Tiny(), AdamW(lr=LR), OffloadConfig(dtype=HALF, loss_scale=1024.0)) as engine:
        x = torch.ones(2, requires_grad=True)
        with pytest.raises(ValueError, match=r"call torch.autograd.grad\(loss, inputs\)"):
            engine.backward(x.sum(), inputs=[x])
        assert x.grad is None
        engine.backward(loss_of(engine, 0))
        assert not engine.step().skipped


def test_grad_scaler_beside_a_built_in_scale() -> None:
    scaler = torch.amp.GradScaler("cpu")
    with OffloadEngine(Tiny(), AdamW(lr=LR), OffloadConfig(dtype=HALF, loss_scale="dynamic")) as engine:
        scaler.scale(loss_of(engine, 0)).backward()
        with pytest.raises(RuntimeError, match=r"drop the GradScaler, or build the engine with loss_scale=None"):
            scaler.unscale_(engine.optimizer)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_scale": 0.0}, r"loss_scale=0.0; give \"dynamic\", a DynamicLossScale, a positive number"),
        ({"loss_scale": True}, r"loss_scale=True"),
        ({"loss_scale": "auto"}, r"loss_scale='auto'"),
        ({"loss_scale": "dynamic", "update": "backward"}, r'update="backward" cannot skip a step'),
        ({"dtype": torch.float64}, r"the compute dtype is torch.bfloat16, torch.float16 or torch.float32"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OffloadConfig(**settings)


@pytest.mark.parametrize(
    ("name", "value"),
    [("init_scale", 0.0), ("growth_factor", 1.0), ("backoff_factor", 1.0), ("growth_interval", 0)],
)
def test_rules_that_cannot_work(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}={value}"):
        DynamicLossScale(**{name: value})  # type: ignore[arg-type]
