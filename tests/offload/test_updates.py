"""Updates behind the next forward: nothing stale is ever used, nothing is forgotten, and nobody waits for others'."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offload import SGD, AdamW, OffloadConfig, OffloadEngine
from offload.durable import CommitLog
from offload.early import EarlyUpdates
from offload.residency import Residency
from offload.scheduler.devices import FakeDevice
from offload.update import UnitUpdate

ALL_NVME = {"param": "nvme", "states": "nvme", "grad": "nvme"}
PATIENCE_S = 20
SPEC = AdamW(lr=1e-2)


class Gates:
    """Updates of chosen units (by name) wait until their gate is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.closed: dict[str, threading.Event] = {}
        self.waiting = threading.Event()
        work = UnitUpdate._work

        def gated(update: UnitUpdate, *args: Any) -> None:
            gate = self.closed.get(update._layout.unit.name)
            if gate is not None:
                self.waiting.set()
                assert gate.wait(PATIENCE_S)
            work(update, *args)

        monkeypatch.setattr(UnitUpdate, "_work", gated)

    def close(self, unit: str) -> threading.Event:
        self.closed[unit] = threading.Event()
        return self.closed[unit]


@pytest.fixture
def gates(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gates]:
    made = Gates(monkeypatch)
    yield made
    for gate in made.closed.values():
        gate.set()


class Stack(nn.Module):
    """Linear layers in a row, of which a forward may skip some."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(depth))
        self.skip: set[int] = set()
        self.done: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.done = []
        for index, layer in enumerate(self.layers):
            if index not in self.skip:
                x = torch.tanh(layer(x))
                self.done.append(index)
        return x


def config(folder: Path | None = None, **settings: Any) -> OffloadConfig:
    base: dict[str, Any] = {"device": "cpu", "dtype": torch.float32, "host_memory": "64MiB"}
    if folder is not None:
        base |= {"nvme": folder, "homes": ALL_NVME}
    return OffloadConfig(**(base | settings))


def data(number: int) -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(number))


def plain(steps: int, skips: Callable[[int], set[int]] = lambda step: set(), lr: float = 1e-2) -> Stack:
    model = Stack()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for step in range(steps):
        model.skip = skips(step)
        model(data(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def one_step(engine: OffloadEngine, number: int) -> None:
    engine.backward(engine(data(number)).square().mean())
    engine.step()


def assert_close(found: dict[str, Tensor], model: nn.Module) -> None:
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7, msg=name)


def in_thread(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    return thread, results


@pytest.mark.parametrize("placement", ["memory", "nvme", "fake"])
def test_a_forward_waits_for_the_update_of_its_unit_only(placement: str, tmp_path: Path, gates: Gates) -> None:
    settings: dict[str, Any] = {"device": "fake", "device_memory": "1MiB"} if placement == "fake" else {}
    model = Stack()
    with OffloadEngine(model, SPEC, config(None if placement == "memory" else tmp_path, **settings)) as engine:
        engine.backward(engine(data(0)).square().mean())
        gate = gates.close("layers.2")
        engine.step()
        forward, results = in_thread(lambda: engine(data(1)).detach().clone())
        deadline = time.monotonic() + PATIENCE_S
        while model.done != [0, 1] and time.monotonic() < deadline:
            time.sleep(0.002)
        assert gates.waiting.wait(PATIENCE_S)
        forward.join(0.1)
        assert model.done == [0, 1] and forward.is_alive(), "unit 2 may be used only after its update"
        gate.set()
        forward.join(PATIENCE_S)
        torch.testing.assert_close(results[0], plain(1)(data(1)).detach(), rtol=1e-5, atol=1e-7)


def test_without_the_mark_of_staleness_old_values_would_be_used(monkeypatch: pytest.MonkeyPatch, gates: Gates) -> None:
    """The guard taken out: a unit that is still on the device is handed out as it is."""

    def expect(residency: Residency, updates: Any, after: Any) -> Any:
        made = residency._updates.add(updates, after)
        residency.ask_prefetch()
        return made

    monkeypatch.setattr(Residency, "expect", expect)
    with OffloadEngine(Stack(), SPEC, config()) as engine:
        engine.backward(engine(data(0)).square().mean())
        for name in ("layers.0", "layers.1", "layers.2"):
            gates.close(name)
        engine.step()
        found = engine(data(1)).detach()
        for gate in gates.closed.values():
            gate.set()
        assert not torch.allclose(found, plain(1)(data(1)).detach(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("folder", [None, "run"])
def test_a_unit_that_the_next_forward_skips_is_updated_all_the_same(folder: str | None, tmp_path: Path) -> None:
    def skips(step: int) -> set[int]:
        return {1} if step % 2 else set()

    model = Stack()
    with OffloadEngine(model, SPEC, config(tmp_path / folder if folder else None)) as engine:
        for step in range(5):
            model.skip = skips(step)
            one_step(engine, step)
        assert_close(engine.state_dict(), plain(5, skips))


@pytest.mark.parametrize("folder", [None, "run"])
def test_every_way_to_read_values_gives_those_after_the_step(folder: str | None, tmp_path: Path) -> None:
    expected = plain(1)
    name = "layers.2.weight"

    def gathered(engine: OffloadEngine) -> Tensor:
        with engine.gather(name) as values:
            return values[name].value

    ways: list[Callable[[OffloadEngine], Tensor]] = [
        lambda engine: engine.state_dict()[name],
        lambda engine: engine.module.state_dict()[name],
        lambda engine: engine.module.layers[2].weight.detach().clone(),
        gathered,
        lambda engine: next(v.value for p, v in engine.read_states().items() if v.name == name),
    ]
    for number, way in enumerate(ways):
        with OffloadEngine(Stack(), SPEC, config(tmp_path / f"{number}" if folder else None)) as engine:
            one_step(engine, 0)
            torch.testing.assert_close(way(engine), expected.state_dict()[name], rtol=1e-5, atol=1e-7)


def test_values_written_right_after_a_step_are_not_updated_by_it(tmp_path: Path) -> None:
    with OffloadEngine(Stack(), SPEC, config(tmp_path)) as engine:
        one_step(engine, 0)
        engine.load_state_dict({name: torch.ones_like(value) for name, value in Stack().state_dict().items()})
        assert all((value == 1).all() for value in engine.state_dict().values())


def test_hyperparameters_are_those_at_the_time_of_the_step(gates: Gates) -> None:
    with OffloadEngine(Stack(), SPEC, config()) as engine:
        engine.backward(engine(data(0)).square().mean())
        gate = gates.close("layers.0")
        engine.step()
        engine.optimizer.param_groups[0]["lr"] = 100.0
        gate.set()
        assert_close(engine.state_dict(), plain(1))


def test_a_gradient_does_not_land_on_one_that_an_update_still_needs(gates: Gates) -> None:
    """A private copy of a parameter lets its gradient arrive before the unit has been called, and so updated."""
    with OffloadEngine(Stack(), SPEC, config()) as engine:
        private = engine.module.layers[2].weight.sum()
        engine.backward(engine(data(0)).square().mean())
        gate = gates.close("layers.2")
        engine.step()
        home = next(homes["grad"] for homes in engine._parts.homes if homes["grad"].unit == "layers.2")
        assert home.buffer is not None
        before = home.buffer.clone()
        assert gates.waiting.wait(PATIENCE_S)
        private.backward()
        time.sleep(0.1)
        assert torch.equal(home.buffer, before)
        gate.set()
        engine._gradients.wait()
        assert not torch.equal(home.buffer, before)
        engine.optimizer.zero_grad()
        assert_close(engine.state_dict(), plain(1))


MODES = [
    ("next_forward", {"clip_grad_norm": 0.5, "micro_batches": 2}),
    ("backward", {"micro_batches": 2}),
    ("speculative", {"clip_grad_norm": 0.5, "micro_batches": 2}),
    ("speculative", {"clip_grad_norm": 1e3}),
    ("auto", {"clip_grad_norm": 1.9}),
]


@pytest.mark.parametrize("mode", range(len(MODES)))
@pytest.mark.parametrize("device", ["cpu", "fake"])
@pytest.mark.parametrize("rest", ["nvme", "host"])
def test_bits_do_not_depend_on_when_updates_run(
    kit: SimpleNamespace, mode: int, device: str, rest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random delays in every update, in every mode, and a small budget: bits of a run that updates inside step()."""
    chance, work = random.Random(mode), UnitUpdate._work
    batches = kit.batches(12)
    spec = AdamW(lr=1e-2, weight_decay=0.1)
    update, settings = MODES[mode]
    settings = {"dtype": torch.bfloat16, **settings}
    expected = kit.engine_run(kit.TinyGPT(), spec, config(update="step", **settings), batches)

    def late(update: UnitUpdate, *args: Any) -> None:
        time.sleep(chance.uniform(0, 0.002))
        work(update, *args)

    monkeypatch.setattr(UnitUpdate, "_work", late)
    if device == "fake":
        settings |= {"device": FakeDevice(max_delay_s=2e-4), "device_memory": "1MiB"}
    settings |= {"homes": ALL_NVME, "host_memory": "1MiB"} if rest == "nvme" else {"homes": {"states": "host"}}
    found = kit.engine_run(kit.TinyGPT(), spec, config(tmp_path, update=update, **settings), batches)
    kit.assert_same_run(found, expected)


def test_a_failed_update_is_raised_once_as_it_is_and_then_explained(tmp_path: Path) -> None:
    with OffloadEngine(Stack(), SGD(lr=0.1), config()) as engine:
        engine.backward(engine(data(0)).square().mean())
        broken = OSError(5, "the drive is gone")

        def fail(*args: Any) -> None:
            raise broken

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(UnitUpdate, "_work", fail)
            engine.step()
            with pytest.raises(OSError, match="the drive is gone"):
                engine(data(1))
        for use in (lambda: engine(data(1)), engine.step, engine.flush, engine.state_dict):
            with pytest.raises(RuntimeError, match="an update failed midway"):
                use()


class Speculation:
    """Counts what is begun in backward and what is taken back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = self.reverted = 0
        begin, revert = Residency.begin_early, CommitLog.revert

        def counted_begin(*args: Any) -> Any:
            made = begin(*args)
            self.begun += made is not None
            return made

        async def counted_revert(*args: Any) -> None:
            self.reverted += 1
            await revert(*args)

        monkeypatch.setattr(Residency, "begin_early", counted_begin)
        monkeypatch.setattr(CommitLog, "revert", counted_revert)


@pytest.fixture
def speculation(monkeypatch: pytest.MonkeyPatch) -> Speculation:
    return Speculation(monkeypatch)


def all_landed(engine: OffloadEngine) -> None:
    """Until the gradients are home and all updates that began with them have been made."""
    engine._gradients.wait()
    for made in list(engine._early._made.values()):
        made.result(PATIENCE_S)


@pytest.mark.parametrize("homes", [ALL_NVME, {"states": "host"}], ids=["nvme", "host"])
def test_a_wrong_guess_is_taken_back(homes: dict[str, str], tmp_path: Path, speculation: Speculation) -> None:
    """Clipped in every second step, and once not finite."""
    limits = [1e9, 1e-3]
    reference = Stack()
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2)
    with OffloadEngine(Stack(), SPEC, config(tmp_path, update="speculative", homes=homes)) as engine:
        for step in range(6):
            x = data(step) * (float("inf") if step == 4 else 1.0)
            engine.backward(engine(x).square().mean())
            all_landed(engine)
            engine.clip_grad_norm_(limits[step % 2])
            info = engine.step()
            assert info.skipped == (step == 4)
            if step != 4:
                reference(x).square().mean().backward()
                torch.nn.utils.clip_grad_norm_(reference.parameters(), limits[step % 2])
                optimizer.step()
                optimizer.zero_grad()
        assert_close(engine.state_dict(), reference)
        assert speculation.begun == 18
        assert speculation.reverted == 12, "three steps were clipped and one was not finite, with three units each"


def test_without_going_back_the_clipped_step_would_be_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard taken out: what was begun is kept whatever the norm."""
    monkeypatch.setattr(EarlyUpdates, "take_back", lambda self: None)
    reference = Stack()
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    with OffloadEngine(Stack(), SGD(lr=0.1), config(tmp_path, update="speculative", clip_grad_norm=1e-3)) as engine:
        engine.backward(engine(data(0)).square().mean())
        all_landed(engine)
        engine.step()
        reference(data(0)).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 1e-3)
        optimizer.step()
        with pytest.raises(AssertionError):
            assert_close(engine.state_dict(), reference)


WAYS_TO_LOOK: dict[str, Callable[[OffloadEngine], Any]] = {
    "forward": lambda engine: engine(data(9)).detach(),
    "parameter": lambda engine: engine.module.layers[1].weight.detach().clone(),
    "state_dict": lambda engine: engine.state_dict(),
    "module.state_dict": lambda engine: engine.module.state_dict(),
    "zero_grad": lambda engine: engine.optimizer.zero_grad(),
    "flush": lambda engine: engine.flush(),
}


@pytest.mark.parametrize("way", WAYS_TO_LOOK)
def test_between_backward_and_step_values_are_those_of_before(way: str, tmp_path: Path) -> None:
    with OffloadEngine(Stack(), SPEC, config(tmp_path, update="speculative")) as engine:
        one_step(engine, 0)
        engine.backward(engine(data(1)).square().mean())
        all_landed(engine)
        assert engine._early.has_begun
        with torch.no_grad():
            found = WAYS_TO_LOOK[way](engine)
        if way == "forward":
            torch.testing.assert_close(found, plain(1)(data(9)).detach(), rtol=1e-5, atol=1e-7)
        elif way == "parameter":
            torch.testing.assert_close(found, plain(1).layers[1].weight.detach(), rtol=1e-5, atol=1e-7)
        elif way != "zero_grad" and found is not None:
            assert_close(found, plain(1))
        if way == "zero_grad":
            engine.backward(engine(data(1)).square().mean())
        engine.step()
        assert_close(engine.state_dict(), plain(2))


def test_closing_between_backward_and_step_commits_the_step_before(tmp_path: Path) -> None:
    with OffloadEngine(Stack(), SPEC, config(tmp_path, update="speculative")) as engine:
        one_step(engine, 0)
        engine.backward(engine(data(1)).square().mean())
        all_landed(engine)
    with OffloadEngine(Stack(), SPEC, config(tmp_path, update="speculative", resume=True)) as engine:
        assert engine.steps_done == 1
        assert_close(engine.state_dict(), plain(1))
        one_step(engine, 1)
        assert_close(engine.state_dict(), plain(2))


def test_values_edited_before_the_step_are_not_lost_by_going_back(tmp_path: Path, speculation: Speculation) -> None:
    """An edit that is not committed yet leaves nothing to go back to, so that step does not speculate."""
    reference = plain(1)
    with torch.no_grad():
        reference.layers[0].weight.fill_(0.5)
    with OffloadEngine(Stack(), SPEC, config(tmp_path, update="speculative", clip_grad_norm=1e-3)) as engine:
        engine.optimizer.param_groups[0]["lr"] = 0.0
        one_step(engine, 0)
        begun = speculation.begun
        engine.load_state_dict(reference.state_dict())
        engine.backward(engine(data(1)).square().mean())
        all_landed(engine)
        assert speculation.begun == begun
        engine.step()
        assert_close(engine.state_dict(), reference)


def test_updating_in_backward_says_what_it_cannot_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="speculative"):
        config(update="backward", clip_grad_norm=1.0)
    with pytest.raises(ValueError, match="durability"):
        config(tmp_path, update="speculative", durability=3)
    with OffloadEngine(Stack(), SPEC, config(update="backward")) as engine:
        engine.backward(engine(data(0)).square().mean())
        all_landed(engine)
        engine.clip_grad_norm_(1e-4)
        with pytest.raises(RuntimeError, match="cannot be taken back"):
            engine.step()


def test_auto_speculates_once_steps_are_seen_to_be_unclipped(tmp_path: Path, speculation: Speculation) -> None:
    with OffloadEngine(Stack(), SPEC, config(tmp_path, clip_grad_norm=1e9)) as engine:
        begun = []
        for step in range(6):
            one_step(engine, step)
            begun.append(speculation.begun)
        assert begun == [0, 0, 0, 0, 3, 6]
        for step in range(2):
            engine.backward(engine(data(step)).square().mean())
            engine.clip_grad_norm_(1e-6)
            engine.step()
        before = speculation.begun
        one_step(engine, 7)
        assert speculation.begun == before


@pytest.mark.parametrize("change", ["tensor", "list"])
def test_hyperparameters_changed_in_place_after_backward_are_those_of_the_step(change: str, tmp_path: Path) -> None:
    reference = Stack()
    optimizer = torch.optim.AdamW(reference.parameters(), lr=5e-3, betas=(0.5, 0.99))
    with OffloadEngine(Stack(), SPEC, config(tmp_path, update="speculative")) as engine:
        (group,) = engine.optimizer.param_groups
        group["lr"] = torch.tensor(1e-2) if change == "tensor" else 5e-3
        group["betas"] = (0.5, 0.99) if change == "tensor" else [0.9, 0.99]
        engine.backward(engine(data(0)).square().mean())
        all_landed(engine)
        if change == "tensor":
            group["lr"].fill_(5e-3)
        else:
            group["betas"][0] = 0.5
        engine.step()
        group["lr"] = 5e-3
        one_step(engine, 1)
        for step in range(2):
            reference(data(step)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert_close(engine.state_dict(), reference)


@pytest.mark.timeout(60)
def test_what_waits_for_an_early_update_does_not_wait_for_a_unit_that_no_forward_uses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The early update waits for the commit before it, and that one for the update of the unit that was left out."""
    monkeypatch.setattr(Residency, "_prefetch", lambda residency: None)

    def skips(step: int) -> set[int]:
        return {1} if step % 2 else set()

    model = Stack()
    with OffloadEngine(model, SPEC, config(tmp_path, update="speculative")) as engine:
        for step in range(4):
            model.skip = skips(step)
            engine.backward(engine(data(step)).square().mean())
            engine.state_dict()
            engine.step()
        assert_close(engine.state_dict(), plain(4, skips))
