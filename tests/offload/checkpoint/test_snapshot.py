"""A save in the background is a true snapshot: the next steps never leak in, however slow the copy is."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from offload import CheckpointFailed, OffloadEngine
from offload.access import ParameterAccess
from offload.checkpoint.snapshot import Snapshot
from offload.checkpoint.verification import verify
from offload.weights.files import TensorFile, TensorFileWriter

MODES = ["memory", "nvme", "mixed", "step", "fake"]


@pytest.fixture
def slow_copies(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Every read for a copy comes 30 ms late, long enough for a step. Yields the names of units as they are copied."""
    original, copies = ParameterAccess.read, []

    def read(self: ParameterAccess, layout: Any, wanted: Any, **options: Any) -> Any:
        if threading.current_thread().name == "offload-checkpoint":
            copies.append(layout.unit.name)
            time.sleep(0.03)
        return original(self, layout, wanted, **options)

    monkeypatch.setattr(ParameterAccess, "read", read)
    yield copies


def saved_values(path: Path) -> dict[str, torch.Tensor]:
    """Everything in the checkpoint's safetensors files by name."""
    found = {}
    for name in sorted(path.glob("*.safetensors")):
        with TensorFile(name) as file:
            found.update({tensor: file.view(tensor).clone() for tensor in file.tensors})
    return found


def values_of(engine: OffloadEngine, runs: SimpleNamespace) -> dict[str, torch.Tensor]:
    """The same of a running engine."""
    found = {}
    with engine.gather("*") as parameters:
        for name, host in parameters.items():
            found[name] = host.value.clone()
            found.update({f"{name}/{kind}": state.clone() for kind, state in host.states.items()})
    found.update({name: buffer.detach().clone() for name, buffer in engine.module.named_buffers()})
    return found


def leaked(runs: SimpleNamespace, engine: OffloadEngine, folder: Path) -> list[str]:
    """Names whose saved values are not those of the step after which `save` was called, with three steps behind it."""
    runs.seed_all(8)
    runs.train(engine, 2)
    expected = values_of(engine, runs)
    runs.train(engine, 1)
    expected_later = values_of(engine, runs)
    assert len(runs.differing(expected, expected_later)) > 20  # each step changes nearly everything
    path = engine.save(folder, background=True)
    runs.train(engine, 3)
    engine._checkpoints.wait()
    assert verify(path) == []
    return runs.differing(saved_values(path), expected_later)


@pytest.mark.parametrize("mode", MODES)
def test_the_next_steps_do_not_leak_in(
    runs: SimpleNamespace, tmp_path: Path, slow_copies: list[str], mode: str
) -> None:
    with runs.build(frozen=True, **runs.placements(tmp_path)[mode]) as engine:
        assert leaked(runs, engine, tmp_path / "run") == []


@pytest.mark.parametrize("mode", ["memory", "nvme"])
def test_without_the_wait_they_would(
    runs: SimpleNamespace, tmp_path: Path, slow_copies: list[str], monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """The test above sees what it looks for."""

    async def at_once(self: Any, unit: int) -> None:
        return

    monkeypatch.setattr("offload.checkpoint.snapshot.Snapshot.wait_copied", at_once)
    with runs.build(frozen=True, **runs.placements(tmp_path)[mode]) as engine:
        assert leaked(runs, engine, tmp_path / "run") != []


def test_save_returns_before_the_copy_and_what_is_waited_for_is_copied_first(
    runs: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write to the last unit waits for the copy of that unit, and for no other that has not begun."""
    original, copies, may_go_on = ParameterAccess.read, [], threading.Event()

    def read(self: ParameterAccess, layout: Any, wanted: Any, **options: Any) -> Any:
        if threading.current_thread().name == "offload-checkpoint":
            assert may_go_on.wait(30)
            copies.append(layout.unit.name)
        return original(self, layout, wanted, **options)

    monkeypatch.setattr(ParameterAccess, "read", read)
    with runs.build(device="cpu") as engine:
        before = {name: host.value.clone() for name, host in _gather(engine, "norm.*").items()}
        path = engine.save(tmp_path, background=True)
        assert not path.exists()
        assert copies == []
        threading.Timer(0.05, may_go_on.set).start()
        with engine.gather("norm.*", write=True) as parameters:
            for host in parameters.values():
                host.value.fill_(3.0)
        num_copied_before_the_write = len(copies)
        engine._checkpoints.wait()
        assert copies[:2] == ["blocks.0", "norm"]
        assert num_copied_before_the_write <= 3
        for name, value in before.items():
            assert torch.equal(saved_values(path)[name], value)
        assert float(_gather(engine, "norm.weight")["norm.weight"].value[0]) == 3.0


def _gather(engine: OffloadEngine, pattern: str) -> dict[str, Any]:
    with engine.gather(pattern) as parameters:
        return dict(parameters)


def test_a_failed_background_save_is_raised_and_leaves_nothing(
    runs: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = TensorFileWriter.finish

    def failing(self: TensorFileWriter) -> dict[str, str]:
        if "states-00003" in self.path.name:
            raise OSError(28, "No space left on device")
        return original(self)

    with runs.build(device="cpu") as engine:
        runs.train(engine, 1)
        whole = engine.save(tmp_path)
        runs.train(engine, 1)
        monkeypatch.setattr(TensorFileWriter, "finish", failing)
        engine.save(tmp_path, background=True)
        engine._checkpoints.settle()
        with pytest.raises(CheckpointFailed, match=r"step-000002 in the background failed.*No space left"):
            runs.train(engine, 1)
        assert sorted(path.name for path in tmp_path.iterdir()) == [whole.name]
        runs.train(engine, 1)  # it was said once, and training goes on
        engine.save(tmp_path, background=True)
        with pytest.raises(CheckpointFailed):
            engine._checkpoints.wait()
        with pytest.raises(OSError, match="No space"):  # where somebody waits, it is the error itself
            engine.save(tmp_path)
        engine.save(tmp_path, background=True)
        with pytest.raises(CheckpointFailed, match="step-000003"):
            engine.close()
    monkeypatch.undo()
    with runs.build(seed=2, device="cpu") as engine:
        assert engine.resume(tmp_path).step == 1


def test_close_waits_for_the_save(runs: SimpleNamespace, tmp_path: Path, slow_copies: list[str]) -> None:
    with runs.build(device="cpu") as engine:
        runs.train(engine, 1)
        path = engine.save(tmp_path, background=True)
    assert verify(path) == []


def test_a_second_save_waits_for_the_first(runs: SimpleNamespace, tmp_path: Path, slow_copies: list[str]) -> None:
    with runs.build(device="cpu") as engine:
        first = engine.save(tmp_path, background=True)
        runs.train(engine, 1)
        second = engine.save(tmp_path, background=True)
        assert first.exists()
    assert [verify(path) for path in (first, second)] == [[], []]


def test_memory_of_a_save_is_one_batch(runs: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A unit is copied in groups of parameters, so that it never lies in memory a second time as a whole."""
    monkeypatch.setattr("offload.checkpoint.saving.BATCH_NBYTES", 40_000)
    original, sizes = ParameterAccess.read, []

    def read(self: ParameterAccess, layout: Any, wanted: Any, **options: Any) -> Any:
        found = original(self, layout, wanted, **options)
        sizes.append(sum(t.nbytes for host in found.values() for t in (host.value, *host.states.values())))
        return found

    monkeypatch.setattr(ParameterAccess, "read", read)
    with runs.build(device="cpu") as engine:
        sizes.clear()
        path = engine.save(tmp_path)
    # A block has 4224 parameters in four tensors, 12 bytes each: 24576 + 768 + 24576 + 384 bytes.
    assert max(sizes) <= 40_000
    assert len(sizes) == 3 * 2 + 1
    assert verify(path) == []


def test_only_updates_of_later_steps_wait() -> None:
    """The update of the snapshot's own step asks as well, and must go ahead: the copy waits for it."""

    async def scenario() -> None:
        made: Future[None] = Future()
        snapshot = Snapshot([None, made])
        await asyncio.wait_for(snapshot.wait_copied(1), 5)
        assert snapshot.next() == 0  # what is up to date goes first
        made.set_result(None)
        later = asyncio.create_task(snapshot.wait_copied(1))
        await asyncio.sleep(0)
        assert not later.done()
        assert snapshot.next() == 1  # somebody waits for it
        snapshot.copied(1)
        await asyncio.wait_for(later, 5)
        first = asyncio.create_task(snapshot.wait_copied(0))
        await asyncio.sleep(0)
        first.cancel()  # whoever gives up waiting takes nothing from the others
        await asyncio.wait([first])
        snapshot.copied(0)
        await asyncio.wait_for(snapshot.wait_copied(0), 5)
        assert snapshot.next() is None

    asyncio.run(scenario())
