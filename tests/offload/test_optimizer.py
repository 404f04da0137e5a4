"""`engine.optimizer`, gradients and steps mean what they mean in torch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from offload import SGD, Adam, AdamW, OffloadConfig, OffloadEngine

FP32 = {"dtype": torch.float32}


def make() -> nn.Module:
    torch.manual_seed(6)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 1))


def loss_of(call: Callable[..., Any], step: int) -> Tensor:
    return (call(torch.randn(5, 6, generator=torch.Generator().manual_seed(step))) - 1.0).square().mean()


def assert_followed(kit: SimpleNamespace, engine: OffloadEngine, plain: nn.Module, bound: float = 1e-3) -> None:
    start = {name: p.detach() for name, p in make().named_parameters()}
    values = {name: host.value for name, host in kit.state_of(engine).items()}
    reference = {name: p.detach() for name, p in plain.named_parameters()}
    assert kit.relative_difference(values, reference, start) <= bound


def train_plain(plain: nn.Module, optimizer: torch.optim.Optimizer, num_steps: int = 6) -> None:
    for step in range(num_steps):
        loss_of(plain, step).backward()
        optimizer.step()
        optimizer.zero_grad()


def train_engine(engine: OffloadEngine, num_steps: int = 6) -> None:
    for step in range(num_steps):
        engine.backward(loss_of(engine, step))
        engine.step()


# -- groups


def no_decay_for_vectors(name: str, parameter: nn.Parameter) -> dict[str, Any]:
    return {"weight_decay": 0.0} if name.endswith("bias") else {"lr": 3e-2}


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    named = dict(model.named_parameters())
    return [
        {"params": [p for n, p in named.items() if n.endswith("weight")], "lr": 3e-2},
        {"params": [p for n, p in named.items() if n.endswith("bias")], "weight_decay": 0.0},
    ]


@pytest.mark.parametrize("how", ["function", "list of parameters", "list of names"])
def test_groups(kit: SimpleNamespace, settings: dict[str, Any], how: str) -> None:
    plain = make()
    optimizer = torch.optim.AdamW(groups_of(plain), lr=1e-2, weight_decay=0.5)
    train_plain(plain, optimizer)
    model = make()
    names = [n for n, _ in model.named_parameters()]
    groups = {
        "function": no_decay_for_vectors,
        "list of parameters": groups_of(model),
        "list of names": [
            {"params": [n for n in names if n.endswith("weight")], "lr": 3e-2},
            {"params": [n for n in names if n.endswith("bias")], "weight_decay": 0.0},
        ],
    }[how]
    spec = AdamW(lr=1e-2, weight_decay=0.5, groups=groups)
    with OffloadEngine(model, spec, OffloadConfig(**FP32, **settings)) as engine:
        mine = [(g["lr"], g["weight_decay"], len(g["params"])) for g in engine.optimizer.param_groups]
        assert mine == [(g["lr"], g["weight_decay"], len(g["params"])) for g in optimizer.param_groups]
        train_engine(engine)
        assert_followed(kit, engine, plain)


def test_groups_are_live(kit: SimpleNamespace) -> None:
    """What a user writes into `param_groups` holds from the next step on."""
    plain = make()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.5)
    with OffloadEngine(make(), SGD(lr=0.1, momentum=0.5), OffloadConfig(**FP32)) as engine:
        assert isinstance(engine.optimizer, torch.optim.Optimizer)
        for step in range(4):
            for group in (optimizer.param_groups[0], engine.optimizer.param_groups[0]):
                group["lr"], group["momentum"] = 0.1 / (step + 1), 0.5 + 0.1 * step
            loss_of(plain, step).backward()
            optimizer.step()
            optimizer.zero_grad()
            engine.backward(loss_of(engine, step))
            assert engine.step().lr == 0.1 / (step + 1)
        assert_followed(kit, engine, plain)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([{"params": ["0.weight", "no.such"]}], r"group 0 lists 'no.such', which is not a trainable parameter"),
        ([{"params": ["0.weight"]}], r"5 trainable parameters are in no group, first '0.bias'; add them to a group"),
        (lambda name, p: {"learning_rate": 1.0}, r"AdamW has no setting 'learning_rate'; it has lr"),
        (lambda name, p: {"lr": -1.0}, r"lr=-1.0; AdamW needs a number >= 0"),
    ],
)
def test_groups_that_cannot_work(groups: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OffloadEngine(make(), AdamW(groups=groups), OffloadConfig(**FP32))


def test_parameter_in_two_groups() -> None:
    model = make()
    everything = [name for name, _ in model.named_parameters()]
    groups = [{"params": everything}, {"params": ["0.bias"]}]
    with pytest.raises(ValueError, match=r"'0.bias' is in groups 0 and 1; list it once"):
        OffloadEngine(model, AdamW(groups=groups), OffloadConfig(**FP32))


def test_add_param_group_is_refused() -> None:
    with (
        OffloadEngine(make(), AdamW(), OffloadConfig(**FP32)) as engine,
        pytest.raises(RuntimeError, match=r"add_param_group .* AdamW\(groups=\[\.\.\.\]\)"),
    ):
        engine.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})


# -- schedulers

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "step": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=12),
    "warm-up then cosine": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(o, 7)],
        [3],
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_lr_schedulers_drive_the_engine(kit: SimpleNamespace, name: str) -> None:
    plain = make()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    scheduler = SCHEDULERS[name](optimizer)
    expected: list[tuple[float, Any]] = []
    for step in range(10):
        loss_of(plain, step).backward()
        expected.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"]))
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    seen: list[tuple[float, Any]] = []
    with OffloadEngine(make(), AdamW(lr=1e-2), OffloadConfig(**FP32)) as engine, warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = SCHEDULERS[name](engine.optimizer)
        for step in range(10):
            engine.backward(loss_of(engine, step))
            betas = engine.optimizer.param_groups[0]["betas"]
            if step % 2:
                seen.append((engine.step().lr, betas))
            else:
                seen.append((engine.optimizer.param_groups[0]["lr"], betas))
                engine.optimizer.step()
            scheduler.step()
        assert_followed(kit, engine, plain)
    assert seen == expected
    assert len({lr for lr, _ in seen}) > 2


def test_plateau_scheduler(kit: SimpleNamespace) -> None:
    with OffloadEngine(make(), SGD(lr=1.0), OffloadConfig(**FP32)) as engine, warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = lr_scheduler.ReduceLROnPlateau(engine.optimizer, factor=0.1, patience=0)
        for step in range(3):
            engine.backward(loss_of(engine, step))
            assert engine.step().lr == pytest.approx((1.0, 1.0, 0.1)[step])
            scheduler.step(1.0)


# -- accumulation, step counts


def test_step_counts_are_per_parameter(kit: SimpleNamespace, settings: dict[str, Any]) -> None:
    """A parameter without a gradient does not age: bias correction is its own, and its moments stay."""

    class Alternating(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.even, self.odd, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 1)

        def forward(self, x: Tensor, step: int) -> Tensor:
            return self.last(torch.tanh((self.odd if step % 3 else self.even)(x)))

    def make_alternating() -> Alternating:
        torch.manual_seed(8)
        return Alternating()

    def alternating_loss(call: Callable[..., Any], step: int) -> Tensor:
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
        return (call(x, step) - 1).square().mean()

    plain = make_alternating()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    for step in range(7):
        alternating_loss(plain, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    with OffloadEngine(make_alternating(), AdamW(lr=1e-2), OffloadConfig(**FP32, **settings)) as engine:
        for step in range(7):
            engine.backward(alternating_loss(engine, step))
            engine.step()
        state = kit.state_of(engine)
    start = {name: p.detach() for name, p in make_alternating().named_parameters()}
    reference = {name: p.detach() for name, p in plain.named_parameters()}
    assert kit.relative_difference({n: h.value for n, h in state.items()}, reference, start) <= 1e-3
    for name, parameter in plain.named_parameters():
        assert state[name].step == int(optimizer.state[parameter]["step"])
        torch.testing.assert_close(
            state[name].states["exp_avg"], optimizer.state[parameter]["exp_avg"], rtol=1e-4, atol=1e-7
        )
    assert (state["even.weight"].step, state["odd.weight"].step, state["last.weight"].step) == (3, 4, 7)


def test_partial_step_is_a_shorter_accumulation(kit: SimpleNamespace, settings: dict[str, Any]) -> None:
    plain = make()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    with OffloadEngine(make(), AdamW(lr=1e-2), OffloadConfig(**FP32, micro_batches=3, **settings)) as engine:
        for num_backwards in (3, 2, 1, 3):
            norms = []
            for step in range(num_backwards):
                loss_of(plain, step).backward()
                engine.backward(loss_of(engine, step))
            norms.append(float(nn.utils.clip_grad_norm_(plain.parameters(), math.inf)))
            info = engine.step(partial=num_backwards < 3)
            assert info.grad_norm == pytest.approx(norms[-1], rel=1e-5)
            optimizer.step()
            optimizer.zero_grad()
        assert_followed(kit, engine, plain)


def test_step_without_enough_backwards() -> None:
    with OffloadEngine(make(), AdamW(), OffloadConfig(**FP32, micro_batches=3)) as engine:
        with pytest.raises(RuntimeError, match=r"after 0 of 3 backwards .*call engine.backward\(loss\) first"):
            engine.step()
        with pytest.raises(RuntimeError, match=r"after 0 of 3 backwards"):
            engine.step(partial=True)
        engine.backward(loss_of(engine, 0))
        with pytest.raises(RuntimeError, match=r"after 1 of 3 backwards .*step\(partial=True\)"):
            engine.step()
        assert not engine.step(partial=True).skipped


def test_too_many_backwards() -> None:
    with OffloadEngine(make(), AdamW(), OffloadConfig(**FP32)) as engine:
        engine.backward(loss_of(engine, 0))
        loss = loss_of(engine, 1)
        with pytest.raises(
            RuntimeError, match=r"backward number 2 of a step with micro_batches=1; call engine.step\(\)"
        ):
            engine.backward(loss)
        assert engine.step().step == 1


# -- gradients: clipping, dropping, reading


@pytest.mark.parametrize("max_norm", [0.01, 1e6])
def test_clip_grad_norm_means_what_torchs_means(
    kit: SimpleNamespace, settings: dict[str, Any], max_norm: float
) -> None:
    plain = make()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    with OffloadEngine(make(), SGD(lr=0.1), OffloadConfig(**FP32, **settings)) as engine:
        for step in range(4):
            loss_of(plain, step).backward()
            expected = nn.utils.clip_grad_norm_(plain.parameters(), max_norm)
            optimizer.step()
            optimizer.zero_grad()
            engine.backward(loss_of(engine, step))
            norm = engine.clip_grad_norm_(max_norm)
            assert isinstance(norm, Tensor) and float(norm) == pytest.approx(float(expected), rel=1e-5)
            assert engine.clip_grad_norm_(max_norm) <= max_norm * (1 + 1e-6)  # the second sees clipped gradients
            engine.step()
        assert_followed(kit, engine, plain)


def test_clip_grad_norm_of_another_norm() -> None:
    with OffloadEngine(make(), SGD(), OffloadConfig(**FP32)) as engine:
        engine.backward(loss_of(engine, 0))
        with pytest.raises(ValueError, match=r"norm_type=inf; .*norm_type=2.0"):
            engine.clip_grad_norm_(1.0, norm_type=math.inf)


def test_clip_grad_norm_of_nonfinite_gradients() -> None:
    with OffloadEngine(make(), SGD(), OffloadConfig(**FP32)) as engine:
        engine.backward(loss_of(engine, 0) * math.inf)
        with pytest.raises(RuntimeError, match=r"gradient norm is (nan|inf); drop the gradients"):
            engine.clip_grad_norm_(1.0, error_if_nonfinite=True)
        engine.optimizer.zero_grad()
        engine.backward(loss_of(engine, 0))
        assert not engine.step().skipped


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize(
    "clip",
    [
        lambda p, foreach: nn.utils.clip_grad_norm_(p, 1.0, foreach=foreach),
        lambda p, foreach: nn.utils.clip_grad_value_(p, 1.0, foreach=foreach),
        lambda p, foreach: nn.utils.get_total_norm([q.grad for q in p], foreach=foreach),
    ],
    ids=["clip_grad_norm_", "clip_grad_value_", "get_total_norm"],
)
def test_torchs_own_clipping_raises(clip: Any, foreach: bool | None) -> None:
    """The gradients are not where torch looks; a norm of nothing would be silently wrong."""
    with OffloadEngine(make(), SGD(), OffloadConfig(**FP32)) as engine:
        engine.backward(loss_of(engine, 0))
        with pytest.raises(RuntimeError, match=r"gradient that lives in the engine; clip with engine.clip_grad_norm_"):
            clip(list(engine.module.parameters()), foreach)
        assert not engine.step().skipped


def test_grad_shows_that_there_is_one() -> None:
    with OffloadEngine(make(), SGD(), OffloadConfig(**FP32)) as engine:
        parameters = dict(engine.module.named_parameters())
        assert all(p.grad is None for p in parameters.values())
        engine.backward(loss_of(engine, 0))
        for parameter in parameters.values():
            assert parameter.grad is not None and parameter.grad.shape == parameter.shape
            with pytest.raises(RuntimeError, match=r"engine.gather"):
                parameter.grad + 1
        engine.step()
        assert all(p.grad is None for p in parameters.values())


@pytest.mark.parametrize("how", ["optimizer", "optimizer, set to zero", "module"])
def test_zero_grad_drops_an_unfinished_accumulation(kit: SimpleNamespace, settings: dict[str, Any], how: str) -> None:
    def run(interrupted: bool) -> Any:
        config = OffloadConfig(**FP32, micro_batches=2, **({"device": "cpu"} if not interrupted else settings))
        with OffloadEngine(make(), AdamW(lr=1e-2), config) as engine:
            for step in range(3):
                if interrupted:
                    engine.backward(loss_of(engine, 99))
                    {
                        "optimizer": engine.optimizer.zero_grad,
                        "optimizer, set to zero": lambda: engine.optimizer.zero_grad(set_to_none=False),
                        "module": engine.module.zero_grad,
                    }[how]()
                engine.backward(loss_of(engine, 2 * step))
                engine.backward(loss_of(engine, 2 * step + 1))
                engine.step()
            return kit.state_of(engine)

    kit.assert_same_state(run(True), run(False))


def test_plain_torch_loop(kit: SimpleNamespace, settings: dict[str, Any]) -> None:
    """zero_grad first, `loss.backward()`, `optimizer.step()`: the zero_grad that follows never drops an update."""
    plain = make()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    train_plain(plain, optimizer)
    with OffloadEngine(make(), AdamW(lr=1e-2), OffloadConfig(**FP32, **settings)) as engine:
        for step in range(6):
            engine.optimizer.zero_grad()
            loss_of(engine, step).backward()
            engine.optimizer.step()
            engine.optimizer.zero_grad()
        assert_followed(kit, engine, plain)


def test_closure(kit: SimpleNamespace) -> None:
    plain = make()
    train_plain(plain, torch.optim.SGD(plain.parameters(), lr=0.1), 1)
    with OffloadEngine(make(), SGD(lr=0.1), OffloadConfig(**FP32)) as engine:

        def closure() -> Tensor:
            loss = loss_of(engine, 0)
            engine.backward(loss)
            return loss

        assert float(engine.optimizer.step(closure).detach()) == float(loss_of(make(), 0).detach())
        assert_followed(kit, engine, plain)


# -- numbers that are none


@pytest.mark.parametrize("kind", ["nan loss", "inf gradient", "inf loss alone"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_nonfinite_step_is_skipped(
    kit: SimpleNamespace, settings: dict[str, Any], kind: str, dtype: torch.dtype
) -> None:
    config = OffloadConfig(dtype=dtype, clip_grad_norm=1.0, **settings)

    def loss_in_dtype(call: Any, step: int) -> Tensor:
        return loss_of(lambda x: call(x.to(dtype)).float(), step)

    with OffloadEngine(make(), AdamW(lr=1e-2), config) as engine:
        for step in range(2):
            engine.backward(loss_in_dtype(engine, step))
            engine.step()
        before = kit.state_of(engine)
        bad = {"nan loss": math.nan, "inf gradient": math.inf, "inf loss alone": math.inf}[kind]
        loss = loss_in_dtype(engine, 2)
        engine.backward(loss + bad if kind == "inf loss alone" else loss * bad)
        info = engine.step()
        assert info.skipped and info.step == 3
        assert not math.isfinite(info.loss)
        assert math.isfinite(info.grad_norm) == (kind == "inf loss alone")
        kit.assert_same_state(kit.state_of(engine), before)
        engine.backward(loss_in_dtype(engine, 3))
        assert not engine.step().skipped
        assert kit.state_of(engine)["0.weight"].step == 3


def test_one_infinite_element_is_found(kit: SimpleNamespace, settings: dict[str, Any]) -> None:
    """A single infinite gradient among finite ones, with `loss.backward()`, whose loss the engine does not see."""
    with OffloadEngine(make(), AdamW(lr=1e-2), OffloadConfig(**FP32, **settings)) as engine:
        before = kit.state_of(engine)
        loss_of(engine, 0).backward()
        with engine.gather("2.bias", write=True) as parameters:
            parameters["2.bias"].grad[3] = -math.inf
        info = engine.step()
        assert info.skipped and info.loss is None and info.grad_norm == math.inf
        kit.assert_same_state(kit.state_of(engine), before)


# -- reports and hand-over


def test_step_info(kit: SimpleNamespace, settings: dict[str, Any]) -> None:
    with OffloadEngine(kit.TinyGPT(), SGD(lr=0.25), OffloadConfig(**FP32, micro_batches=2, **settings)) as engine:
        for number in (1, 2):
            losses = []
            for x, y in kit.batches(2):
                loss = engine(x, y)
                engine.backward(loss)
                losses.append(loss.detach())
            info = engine.step()
            assert (info.step, info.lr, info.skipped) == (number, 0.25, False)
            assert info.loss == float(losses[0] + losses[1])
            assert info.tokens == 2 * 4 * 16
            assert info.seconds > 0
            lanes = {"compute", "h2d", "d2h", "read", "write", "cpu"}
            assert set(info.nbytes) == set(info.busy_s) == set(info.exposed_s) == lanes
            assert 0 < info.busy_s["compute"] <= info.seconds
            assert sum(info.exposed_s.values()) <= info.seconds
            assert (info.nbytes["read"] > 0) == ("homes" in settings)
            assert (info.nbytes["h2d"] > 0) == ("device_memory" in settings)
            with pytest.raises(AttributeError):
                info.loss = 0.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("spec", "make_optimizer"),
    [
        (AdamW(lr=1e-2), lambda p: torch.optim.AdamW(p, lr=1e-2)),
        (Adam(lr=1e-2, weight_decay=0.1), lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1)),
        (SGD(lr=0.1, momentum=0.9), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
    ],
    ids=["adamw", "adam", "sgd"],
)
def test_optimizer_state_goes_on_in_torch(
    kit: SimpleNamespace, settings: dict[str, Any], spec: Any, make_optimizer: Any
) -> None:
    """Three steps in the engine, weights and states handed over, three more in plain torch: as six in torch."""
    plain = make()
    train_plain(plain, make_optimizer(plain.parameters()))
    heir = make()
    with OffloadEngine(make(), spec, OffloadConfig(**FP32, **settings)) as engine:
        train_engine(engine, 3)
        heir.load_state_dict(engine.state_dict())
        states = engine.optimizer.state_dict()
    optimizer = make_optimizer(heir.parameters())
    assert states["param_groups"][0].keys() <= optimizer.state_dict()["param_groups"][0].keys()
    states["param_groups"] = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict(states)
    for step in range(3, 6):
        loss_of(heir, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    start = {name: p.detach() for name, p in make().named_parameters()}
    values = {name: p.detach() for name, p in heir.named_parameters()}
    reference = {name: p.detach() for name, p in plain.named_parameters()}
    assert kit.relative_difference(values, reference, start) <= 1e-3
