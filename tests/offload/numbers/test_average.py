"""The moving average of the weights: a streamed kind, updated beside the moments."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from offload import SGD, AdamW, DynamicLossScale, OffloadConfig, OffloadEngine, TorchOptimizer
from offload.durable import RunState

DECAY = 0.9
LR = 1e-2
FP32, BF16, HALF = torch.float32, torch.bfloat16, torch.float16
ALL_NVME = {"param": "nvme", "states": "nvme", "grad": "nvme"}


class Branches(nn.Module):
    """A trunk, two branches of which a call takes one, and a frozen head."""

    def __init__(self, dtype: torch.dtype = FP32) -> None:
        super().__init__()
        self.dtype = dtype
        torch.manual_seed(2)
        self.trunk = nn.Linear(6, 16, bias=False)  # a bias before a norm has no gradient but rounding noise
        self.norm = nn.BatchNorm1d(16, affine=False)
        self.branches = nn.ModuleList(nn.Linear(16, 8) for _ in range(2))
        self.head = nn.Linear(8, 1).requires_grad_(False)

    def forward(self, x: Tensor, branch: int = 0) -> Tensor:
        x = torch.tanh(self.norm(self.trunk(x.to(self.dtype)).float()).to(self.dtype))
        return self.head(self.branches[branch](x)).float()


def inputs(step: int) -> Tensor:
    return torch.randn(9, 6, generator=torch.Generator().manual_seed(step))


def loss_of(call: Any, step: int) -> Tensor:
    """The second branch has a gradient in every third step."""
    return (call(inputs(step), int(step % 3 == 2)) - 1.0).square().mean()


def train(engine: OffloadEngine, steps: range = range(6)) -> None:
    for step in steps:
        engine.backward(loss_of(engine, step))
        engine.step()


def averages(engine: OffloadEngine) -> dict[str, Tensor]:
    with engine.gather("*") as parameters:
        return {name: host.states["ema"].clone() for name, host in parameters.items() if host.states}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "torch"])
def test_average_of_plain_torch(kit: SimpleNamespace, settings: dict[str, Any], optimizer: str) -> None:
    """`AveragedModel` averages every parameter at every step, also one that has no gradient."""
    spec, make_optimizer = {
        "adamw": (AdamW(lr=LR), lambda ps: torch.optim.AdamW(ps, lr=LR)),
        "sgd": (SGD(lr=0.1), lambda ps: torch.optim.SGD(ps, lr=0.1)),
        "torch": (TorchOptimizer(torch.optim.NAdam, lr=LR), lambda ps: torch.optim.NAdam(ps, lr=LR)),
    }[optimizer]
    plain = Branches()
    start = {name: p.detach().clone() for name, p in plain.named_parameters()}
    averaged = AveragedModel(plain, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    torchs = make_optimizer([p for p in plain.parameters() if p.requires_grad])
    with OffloadEngine(Branches(), spec, OffloadConfig(dtype=FP32, ema_decay=DECAY, **settings)) as engine:
        for step in range(6):
            loss_of(plain, step).backward()
            torchs.step()
            torchs.zero_grad()
            averaged.update_parameters(plain)
            engine.backward(loss_of(engine, step))
            engine.step()
        found = averages(engine)
        expected = {name: p.detach() for name, p in averaged.module.named_parameters() if p.requires_grad}
        assert found.keys() == expected.keys()
        assert kit.relative_difference(found, expected, start) <= 1e-4
        ours, torchs_dict = engine.ema_state_dict(), averaged.module.state_dict()
        assert ours.keys() == torchs_dict.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], torchs_dict[name], rtol=1e-5, atol=1e-5)
            if name in found:
                assert kit.bits(ours[name]) == kit.bits(found[name])
            elif name.startswith("head"):
                assert kit.bits(ours[name]) == kit.bits(start[name])


@pytest.mark.parametrize("dtype", [FP32, BF16, HALF], ids=str)
def test_formula(kit: SimpleNamespace, dtype: torch.dtype) -> None:
    """Bit for bit: the first update copies, later ones move by (average - master) * (1 - decay)."""
    expected: dict[str, Tensor] = {}
    with OffloadEngine(Branches(dtype), AdamW(lr=LR), OffloadConfig(dtype=dtype, ema_decay=DECAY)) as engine:
        before = kit.state_of(engine)
        assert all(kit.bits(h.states["ema"]) == kit.bits(h.value) for h in before.values() if h.states)
        for step in range(5):
            train(engine, range(step, step + 1))
            for name, host in kit.state_of(engine).items():
                if host.states:
                    old = expected.get(name)
                    new = host.value if old is None else old - (old - host.value) * (1.0 - DECAY)
                    expected[name] = new
                    assert kit.bits(host.states["ema"]) == kit.bits(new), (step, name)


PLACEMENTS: dict[str, dict[str, Any]] = {
    "host": {},
    "nvme": {"nvme": True, "homes": ALL_NVME},
    "fake": {"device": "fake", "device_memory": "1MiB"},
    "fake, updates there": {"device": "fake", "device_memory": "16MiB", "update_on": "device"},
    "backward": {"nvme": True, "update": "backward"},
    "speculative": {"nvme": True, "update": "speculative"},
    "step": {"update": "step"},
}


def placed(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, placement in PLACEMENTS.items():
        chosen = dict(placement)
        if chosen.pop("nvme", False):
            chosen["nvme"] = folder / name.replace(",", "").replace(" ", "-")
        yield name, chosen


@pytest.mark.parametrize("dtype", [FP32, BF16, HALF], ids=str)
def test_same_bits_for_every_placement_and_update_mode(
    kit: SimpleNamespace, tmp_path: Path, dtype: torch.dtype
) -> None:
    """Also what is shown inside `averaged_weights`, and everything after it."""
    ends: list[Any] = []
    for _, chosen in placed(tmp_path):
        config = OffloadConfig(dtype=dtype, ema_decay=DECAY, **chosen)
        with OffloadEngine(Branches(dtype), AdamW(lr=LR), config) as engine:
            train(engine, range(3))
            engine.eval()
            with engine.averaged_weights(), torch.no_grad():
                shown = engine(inputs(0))
            engine.train()
            train(engine, range(3, 6))
            ends.append((kit.state_of(engine), shown))
        kit.assert_same_state(ends[-1][0], ends[0][0])
        assert kit.bits(ends[-1][1]) == kit.bits(ends[0][1])
    with OffloadEngine(Branches(dtype), AdamW(lr=LR), OffloadConfig(dtype=dtype)) as engine:
        train(engine)
        for name, host in kit.state_of(engine).items():  # an average that is kept changes nothing else
            assert kit.bits(host.value) == kit.bits(ends[0][0][name].value)


@pytest.mark.parametrize("dtype", [FP32, BF16, HALF], ids=str)
def test_averaged_weights_compute_and_go_again(
    kit: SimpleNamespace, settings: dict[str, Any], dtype: torch.dtype
) -> None:
    config = OffloadConfig(dtype=dtype, ema_decay=DECAY, **settings)
    with OffloadEngine(Branches(dtype), AdamW(lr=LR), config) as engine:
        train(engine)
        before, buffers = kit.state_of(engine), engine.ema_state_dict()
        other = Branches(dtype)
        other.load_state_dict(buffers)
        for part in (other.trunk, other.branches, other.head):
            part.to(dtype)
        engine.eval()
        other.eval()
        with engine.averaged_weights():
            with torch.no_grad():
                assert kit.bits(engine(inputs(1), 1)) == kit.bits(other(inputs(1), 1))
            for name, value in engine.state_dict().items():
                assert kit.bits(value) == kit.bits(buffers[name])
        kit.assert_same_state(kit.state_of(engine), before)
        with pytest.raises(KeyError, match="mine"), engine.averaged_weights():
            raise KeyError("mine")
        kit.assert_same_state(kit.state_of(engine), before)


@pytest.mark.parametrize("dtype", [FP32, BF16, HALF], ids=str)
def test_a_chunk_of_several_blocks(kit: SimpleNamespace, dtype: torch.dtype) -> None:
    """The exchange goes block by block; a last one is shorter."""
    model = nn.Sequential(nn.Linear(300, 301, bias=False))
    with OffloadEngine(model, AdamW(lr=LR), OffloadConfig(dtype=dtype, ema_decay=DECAY)) as engine:
        for step in range(2):
            engine.backward(engine(torch.ones(2, 300, dtype=dtype) * (step + 1)).float().square().mean())
            engine.step()
        before, average = kit.state_of(engine), engine.ema_state_dict()["0.weight"]
        assert kit.bits(average) != kit.bits(before["0.weight"].value)
        with engine.averaged_weights():
            shown = kit.state_of(engine)["0.weight"]
            assert kit.bits(shown.value) == kit.bits(average)
            assert kit.bits(shown.states["ema"]) == kit.bits(before["0.weight"].value)
        kit.assert_same_state(kit.state_of(engine), before)


def test_before_the_first_update_the_average_is_the_weights(kit: SimpleNamespace) -> None:
    with OffloadEngine(Branches(), AdamW(lr=LR), OffloadConfig(dtype=FP32, ema_decay=DECAY)) as engine:
        weights = {name: value + 1 for name, value in engine.state_dict().items()}
        engine.load_state_dict(weights)
        for name, value in engine.ema_state_dict().items():
            assert kit.bits(value) == kit.bits(weights[name])
        with engine.averaged_weights():
            assert kit.bits(engine.state_dict()["trunk.weight"]) == kit.bits(weights["trunk.weight"])
        for name, value in averages(engine).items():
            assert kit.bits(value) == kit.bits(weights[name])


def plain_after(steps: int) -> tuple[Branches, torch.optim.Optimizer]:
    """A run of plain torch so far."""
    plain = Branches()
    optimizer = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=LR)
    for step in range(steps):
        loss_of(plain, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    return plain, optimizer


def assert_average_is_the_weights(kit: SimpleNamespace, engine: OffloadEngine) -> None:
    weights = engine.state_dict()
    for name, value in engine.ema_state_dict().items():
        assert kit.bits(value) == kit.bits(weights[name]), name
    for name, value in averages(engine).items():
        assert kit.bits(value) == kit.bits(weights[name]), name
    with engine.averaged_weights():
        for name, value in engine.state_dict().items():
            assert kit.bits(value) == kit.bits(weights[name]), name


def test_states_of_torch_do_not_begin_the_average(kit: SimpleNamespace, settings: dict[str, Any]) -> None:
    """As an `AveragedModel` that is made beside a run that goes on."""
    plain, torchs = plain_after(3)
    config = OffloadConfig(dtype=FP32, ema_decay=DECAY, **settings)
    with OffloadEngine(Branches(), AdamW(lr=LR), config) as engine:
        assert engine.state_dict().keys() == plain.state_dict().keys()
        engine.optimizer.load_state_dict(torchs.state_dict())
        engine.load_state_dict(plain.state_dict())
        assert sum(bool(host.step) for host in kit.state_of(engine).values()) == 5
        assert_average_is_the_weights(kit, engine)
        averaged = AveragedModel(plain, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
        for step in range(3, 6):
            loss_of(plain, step).backward()
            torchs.step()
            torchs.zero_grad()
            averaged.update_parameters(plain)
            train(engine, range(step, step + 1))
            ours, expected = engine.ema_state_dict(), averaged.module.state_dict()
            for name, value in expected.items():
                torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-5)


def test_counts_of_some_parameters_do_not_begin_the_average(kit: SimpleNamespace, settings: dict[str, Any]) -> None:
    config = OffloadConfig(dtype=FP32, ema_decay=DECAY, **settings)
    with OffloadEngine(Branches(), AdamW(lr=LR), config) as engine:
        with engine.gather("trunk.*", write=True) as parameters:
            parameters["trunk.weight"].step = 5
            parameters["trunk.weight"].value.add_(1.0)
        assert_average_is_the_weights(kit, engine)
        train(engine, range(1))
        assert_average_is_the_weights(kit, engine)
        train(engine, range(1, 2))
        assert kit.bits(engine.ema_state_dict()["trunk.weight"]) != kit.bits(engine.state_dict()["trunk.weight"])


def test_a_failed_backward_does_not_begin_the_average(kit: SimpleNamespace) -> None:
    """Units that update="backward" has updated keep that; the average of the others is their weights still."""
    config = OffloadConfig(dtype=FP32, ema_decay=DECAY, update="backward")
    with OffloadEngine(Branches(), AdamW(lr=LR), config) as engine:
        complete = engine._gradients.on_complete

        def late(unit: int) -> None:
            time.sleep(0.05)
            complete(unit)

        engine._gradients.on_complete = late  # updates may begin after backward has raised
        handle = engine.module.trunk.weight.register_hook(lambda gradient: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.backward(loss_of(engine, 0))
        handle.remove()
        engine.optimizer.zero_grad()
        assert {host.step for host in kit.state_of(engine).values() if host.states} == {0, 1}
        assert_average_is_the_weights(kit, engine)


def test_an_average_given_before_the_first_update(kit: SimpleNamespace, settings: dict[str, Any]) -> None:
    """It begins then, the others' with their weights."""
    config = OffloadConfig(dtype=FP32, ema_decay=DECAY, **settings)
    with OffloadEngine(Branches(), AdamW(lr=LR), config) as engine:
        expected = averages(engine)
        expected["trunk.weight"].fill_(2.0)
        with engine.gather("trunk.*", write=True) as parameters:
            parameters["trunk.weight"].states["ema"].fill_(2.0)
        for name, value in averages(engine).items():
            assert kit.bits(value) == kit.bits(expected[name]), name
        train(engine, range(1))
        for name, host in kit.state_of(engine).items():
            if host.states:
                old = expected[name]
                assert kit.bits(host.states["ema"]) == kit.bits(old - (old - host.value) * (1.0 - DECAY)), name


@pytest.mark.parametrize("way", ["commit", "checkpoint"])
@pytest.mark.parametrize("begun", [False, True])
def test_whether_it_has_begun_survives(kit: SimpleNamespace, tmp_path: Path, way: str, begun: bool) -> None:
    plain, torchs = plain_after(3)
    common: dict[str, Any] = {"dtype": FP32, "ema_decay": DECAY}
    nvme = {"nvme": tmp_path / "store"} if way == "commit" else {}
    with OffloadEngine(Branches(), AdamW(lr=LR), OffloadConfig(**nvme, **common)) as engine:
        engine.optimizer.load_state_dict(torchs.state_dict())
        engine.load_state_dict(plain.state_dict())
        if begun:
            train(engine, range(3, 5))
        saved = engine.save(tmp_path / "run")
        expected = kit.state_of(engine)
    if way == "commit":
        engine = OffloadEngine(Branches(), AdamW(lr=LR), OffloadConfig(resume=True, **nvme, **common))
    else:
        engine = OffloadEngine(Branches(), AdamW(lr=LR), OffloadConfig(**common))
        engine.resume(saved)
    with engine:
        kit.assert_same_state(kit.state_of(engine), expected)
        weights, ours = engine.state_dict(), engine.ema_state_dict()
        assert (kit.bits(ours["trunk.weight"]) != kit.bits(weights["trunk.weight"])) == begun


def test_a_store_that_does_not_say_whether_it_has_begun(
    kit: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of an older version: it has, with the first count."""
    capture = RunState.capture
    monkeypatch.setattr(
        RunState,
        "capture",
        lambda self, step: {k: v for k, v in capture(self, step).items() if k != "average_begun"},
    )
    config: dict[str, Any] = {"dtype": FP32, "ema_decay": DECAY, "nvme": tmp_path}
    for steps in (range(0), range(3)):
        with OffloadEngine(Branches(), AdamW(lr=LR), OffloadConfig(overwrite=True, **config)) as engine:
            train(engine, steps)
            expected = kit.state_of(engine)
        with OffloadEngine(Branches(), AdamW(lr=LR), OffloadConfig(resume=True, **config)) as engine:
            kit.assert_same_state(kit.state_of(engine), expected)


def test_skipped_steps_do_not_count(kit: SimpleNamespace) -> None:
    config = OffloadConfig(dtype=HALF, ema_decay=DECAY, loss_scale=DynamicLossScale(init_scale=2.0**10))
    with OffloadEngine(Branches(HALF), AdamW(lr=LR), config) as engine:
        train(engine, range(2))
        before = kit.state_of(engine)
        engine.backward(loss_of(engine, 2) * 1e9)
        assert engine.step().skipped
        kit.assert_same_state(kit.state_of(engine), before)


@pytest.mark.parametrize("homes", [{}, ALL_NVME], ids=["host", "nvme"])
def test_average_survives(kit: SimpleNamespace, tmp_path: Path, homes: dict[str, str]) -> None:
    common: dict[str, Any] = {"dtype": BF16, "ema_decay": DECAY}
    with OffloadEngine(Branches(BF16), AdamW(lr=LR), OffloadConfig(**common)) as engine:
        train(engine)
        expected = kit.state_of(engine)
    with OffloadEngine(Branches(BF16), AdamW(lr=LR), OffloadConfig(nvme=tmp_path, homes=homes, **common)) as engine:
        train(engine, range(3))
    config = OffloadConfig(nvme=tmp_path, resume=True, **common)
    with OffloadEngine(Branches(BF16), AdamW(lr=LR), config) as engine:
        train(engine, range(3, 6))
        kit.assert_same_state(kit.state_of(engine), expected)
    with pytest.raises(ValueError, match="optimizer"):
        OffloadEngine(Branches(BF16), AdamW(lr=LR), OffloadConfig(nvme=tmp_path, resume=True, dtype=BF16))


@pytest.mark.parametrize("dtype", [FP32, BF16, HALF], ids=str)
def test_saved_and_resumed_elsewhere(kit: SimpleNamespace, tmp_path: Path, dtype: torch.dtype) -> None:
    """A checkpoint in its portable form holds averages, states of any shape and the loss scale."""
    for spec in (AdamW(lr=LR), TorchOptimizer(torch.optim.Adafactor, lr=LR)):
        scale = DynamicLossScale(init_scale=256.0, growth_interval=2)
        common: dict[str, Any] = {"dtype": dtype, "ema_decay": DECAY, "loss_scale": scale}
        folder = tmp_path / type(spec).__name__
        with OffloadEngine(Branches(dtype), spec, OffloadConfig(**common)) as engine:
            train(engine, range(3))
            saved = engine.save(folder / "saved")
            train(engine, range(3, 6))
            expected = kit.state_of(engine), engine.loss_scale
        with OffloadEngine(
            Branches(dtype), spec, OffloadConfig(nvme=folder / "store", homes=ALL_NVME, **common)
        ) as engine:
            engine.resume(saved)
            train(engine, range(3, 6))
            kit.assert_same_state(kit.state_of(engine), expected[0])
            assert engine.loss_scale == expected[1]


def test_closing_inside_keeps_the_weights(kit: SimpleNamespace, tmp_path: Path) -> None:
    config: dict[str, Any] = {"dtype": FP32, "ema_decay": DECAY, "nvme": tmp_path}
    engine = OffloadEngine(Branches(), AdamW(lr=LR), OffloadConfig(**config))
    train(engine, range(3))
    expected = kit.state_of(engine)
    shown = engine.averaged_weights()
    shown.__enter__()
    engine.close()
    with OffloadEngine(Branches(), AdamW(lr=LR), OffloadConfig(resume=True, **config)) as engine:
        kit.assert_same_state(kit.state_of(engine), expected)


def test_training_inside_is_refused(tmp_path: Path) -> None:
    with OffloadEngine(Branches(), AdamW(lr=LR), OffloadConfig(dtype=FP32, ema_decay=DECAY)) as engine:
        train(engine, range(2))
        states = engine.optimizer.state_dict()
        engine.backward(loss_of(engine, 2))
        with engine.averaged_weights():
            refused = {
                "step": engine.step,
                "backward": lambda: engine.backward(loss_of(engine, 3)),
                "train_step": lambda: engine.train_step([inputs(0)], lambda y, _: y.mean()),
                "load_state_dict": lambda: engine.load_state_dict(engine.state_dict()),
                r"optimizer\.load_state_dict": lambda: engine.optimizer.load_state_dict(states),
                "gather": lambda: engine.gather("*", write=True),
                "flush": engine.flush,
                "save": lambda: engine.save(tmp_path / "save"),
                "resume": lambda: engine.resume(tmp_path / "save"),
                "ema_state_dict": engine.ema_state_dict,
                "averaged_weights": lambda: engine.averaged_weights().__enter__(),
            }
            for what, call in refused.items():
                with pytest.raises(RuntimeError, match=rf"{what}\(.*averaged_weights\(\):`, .*leave it first"):
                    call()
        assert not engine.step().skipped


def test_saving_the_average_for_others(kit: SimpleNamespace, tmp_path: Path) -> None:
    with OffloadEngine(Branches(), AdamW(lr=LR), OffloadConfig(dtype=FP32, ema_decay=DECAY)) as engine:
        train(engine, range(3))
        expected, before = engine.ema_state_dict(), kit.state_of(engine)
        with engine.averaged_weights():
            engine.save_pretrained(tmp_path)
        kit.assert_same_state(kit.state_of(engine), before)
    with OffloadEngine.from_pretrained(tmp_path, AdamW(lr=LR), OffloadConfig(dtype=FP32), module=Branches()) as other:
        found = other.state_dict()
    assert kit.bits(found["trunk.weight"]) != kit.bits(before["trunk.weight"].value)
    for name, value in expected.items():
        assert kit.bits(found[name]) == kit.bits(value), name


def interrupt(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, afterwards: bool) -> None:
    """Ctrl-C at the begin or the end of the given call of a method, counted from 1."""
    original, calls = getattr(owner, name), []

    def interrupted(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == call and not afterwards:
            raise KeyboardInterrupt
        result = original(*args)
        if len(calls) == call and afterwards:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(owner, name, interrupted)


@pytest.mark.parametrize("call", range(1, 7))
@pytest.mark.parametrize(
    "where",
    [("exchange", False), ("exchange", True), ("after", True), ("before", False)],
    ids=lambda w: f"{w[0]}-{w[1]}",
)
def test_an_interrupted_exchange_is_never_taken_for_the_weights(
    kit: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int, where: tuple[str, bool]
) -> None:
    """Three units go in and out. The store keeps the last step; whoever goes on has whole weights or is refused."""
    config: dict[str, Any] = {"dtype": FP32, "ema_decay": DECAY, "nvme": tmp_path}
    engine = OffloadEngine(Branches(), AdamW(lr=LR), OffloadConfig(**config))
    train(engine, range(3))
    engine.flush()
    before = kit.state_of(engine)
    place, afterwards = where
    average = engine._average
    owner, name = {
        "exchange": (engine._access, "exchange_average"),
        "after": (average, "_after_write"),
        "before": (average, "_before_write"),
    }[place]
    with monkeypatch.context() as patch:
        interrupt(patch, owner, name, call, afterwards)
        with pytest.raises(KeyboardInterrupt), engine.averaged_weights():
            pass
    if place == "before" and call <= 3:  # nothing of this unit had begun, and the others are back
        kit.assert_same_state(kit.state_of(engine), before)
        train(engine, range(3, 4))
        engine.close()
        return
    with pytest.raises(RuntimeError, match=r"KeyboardInterrupt.*two different steps"):
        engine(inputs(0))
    engine.close()
    with OffloadEngine(Branches(), AdamW(lr=LR), OffloadConfig(resume=True, **config)) as engine:
        kit.assert_same_state(kit.state_of(engine), before)


def test_a_graph_from_outside_is_refused_inside() -> None:
    """Backward would compute with other weights than forward has."""
    config = OffloadConfig(dtype=FP32, ema_decay=DECAY, activation_memory=0)
    with OffloadEngine(Branches(), AdamW(lr=LR), config) as engine:
        train(engine, range(2))
        loss = loss_of(engine, 2)
        with engine.averaged_weights(), pytest.raises(RuntimeError):
            loss.backward()


def test_settings_that_cannot_work() -> None:
    for decay in (0.0, 1.0, -0.1):
        with pytest.raises(ValueError, match=rf"ema_decay={decay}; give a number between 0 and 1"):
            OffloadConfig(ema_decay=decay)
    with OffloadEngine(Branches(), AdamW(lr=LR), OffloadConfig(dtype=FP32)) as engine:
        for call in (engine.ema_state_dict, lambda: engine.averaged_weights().__enter__()):
            with pytest.raises(RuntimeError, match=r"OffloadConfig\(ema_decay=0.999\)"):
                call()
