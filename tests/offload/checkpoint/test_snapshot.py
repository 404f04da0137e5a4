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

from offload import CheckpointFailed, OffloadEngine, TorchOptimizer
from offload.access import ParameterAccess, Part
from offload.checkpoint import folder as folder_module
from offload.checkpoint.folder import RunFolder
from offload.checkpoint.snapshot import Snapshot
from offload.checkpoint.verification import verify
from offload.weights.files import TensorFile, TensorFileWriter

MODES = ["memory", "nvme", "mixed", "step", "fake"]


@pytest.fixture
def slow_copies(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Every copy of a unit's tensors begins 30 ms late, long enough for a step, and is read in many windows, so that a
    step may come between two of them. Yields the names of units as they are copied."""
    monkeypatch.setattr("offload.access.WINDOW_NBYTES", 8_000)
    original, copies = ParameterAccess.parts, []

    def parts(self: ParameterAccess, layout: Any, wanted: Any = None, **options: Any) -> Iterator[Part]:
        if threading.current_thread().name == "offload-checkpoint":
            copies.append(layout.unit.name)
            time.sleep(0.03)
        yield from original(self, layout, wanted, **options)

    monkeypatch.setattr(ParameterAccess, "parts", parts)
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
    original, copies, may_go_on = ParameterAccess.parts, [], threading.Event()

    def parts(self: ParameterAccess, layout: Any, wanted: Any = None, **options: Any) -> Iterator[Part]:
        if threading.current_thread().name == "offload-checkpoint":
            assert may_go_on.wait(30)
            copies.append(layout.unit.name)
        yield from original(self, layout, wanted, **options)

    monkeypatch.setattr(ParameterAccess, "parts", parts)
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


@pytest.mark.parametrize(
    "spec", [None, TorchOptimizer(torch.optim.RMSprop, lr=1e-3)], ids=["fp32 states", "any states"]
)
@pytest.mark.parametrize("mode", ["memory", "nvme"])
def test_a_unit_is_copied_window_by_window(
    runs: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, spec: Any
) -> None:
    """No buffer of a copy is larger than the window, whatever a parameter takes (8192 bytes and two states here)."""
    monkeypatch.setattr("offload.access.WINDOW_NBYTES", 4096)
    original, buffers = ParameterAccess.parts, set()

    def parts(self: ParameterAccess, *args: Any, **options: Any) -> Iterator[Part]:
        for part in original(self, *args, **options):
            buffers.add(part.values.untyped_storage().nbytes())
            yield part

    monkeypatch.setattr(ParameterAccess, "parts", parts)
    with runs.build(spec=spec, frozen=True, **runs.placements(tmp_path)[mode]) as engine:
        runs.train(engine, 2)
        expected = values_of(engine, runs)
        path = engine.save(tmp_path / "run")
        left_out = engine.save(tmp_path / "trainable", frozen=False)
        assert max(buffers) <= 4096
        assert verify(path) == verify(left_out) == []
        assert runs.differing(saved_values(path), expected) == []
        assert engine.resume(left_out).step == 2  # checksums of frozen values agree


def test_when_old_ones_cannot_be_removed_the_new_one_is_there_and_called_so(
    runs: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> None:
        raise PermissionError(13, "not yours")

    monkeypatch.setattr(RunFolder, "prune", failing)
    with runs.build(device="cpu") as engine:
        path = engine.save(tmp_path, keep=1, background=True)
        engine._checkpoints.settle()
        with pytest.raises(CheckpointFailed, match=r"step-000000 is saved and whole; removing old ones .*not yours"):
            runs.train(engine, 1)
        assert verify(path) == []
        with pytest.raises(CheckpointFailed, match=r"step-000000 is saved and whole"):
            engine.save(tmp_path, keep=1)


def test_when_the_new_one_cannot_be_made_durable_it_is_not_called_lost(
    runs: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = folder_module.sync

    def failing(folder: Path) -> None:
        if folder == tmp_path:
            raise OSError(5, "drive gone")
        original(folder)

    monkeypatch.setattr(folder_module, "sync", failing)
    with runs.build(device="cpu") as engine:
        path = engine.save(tmp_path, background=True)
        with pytest.raises(CheckpointFailed, match=r"step-000000 is there and whole, but .*drive gone"):
            engine.flush()
        assert verify(path) == []


def test_without_a_thread_nothing_is_held(
    runs: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = threading.Thread.start

    def failing(self: threading.Thread) -> None:
        if self.name == "offload-checkpoint":
            raise RuntimeError("can't start new thread")
        original(self)

    with runs.build(device="cpu") as engine:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", failing)
            with pytest.raises(RuntimeError, match="can't start new thread") as raised:
                engine.save(tmp_path, background=True)
        assert verify(engine.save(tmp_path)) == []  # neither is the folder locked, nor is a thread waited for
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", failing)
            with pytest.raises(RuntimeError, match="can't start new thread"):
                engine.save(tmp_path, background=True)
        runs.train(engine, 1)  # no update waits for a copy that nobody makes
        del raised  # until here: what its frames held would have been freed with it


def test_flush_waits_for_the_save(runs: SimpleNamespace, tmp_path: Path, slow_copies: list[str]) -> None:
    with runs.build(device="cpu") as engine:
        path = engine.save(tmp_path, background=True)
        assert not path.exists()
        engine.flush()
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
