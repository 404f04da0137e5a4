"""A run's folder: the last k stay, a kill at any point of a save leaves a whole checkpoint, one run saves into it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

from offload import SGD, CheckpointError, OffloadConfig, OffloadEngine
from offload.checkpoint import folder as folder_module
from offload.checkpoint.folder import RunFolder
from offload.checkpoint.verification import verify


class Killed(BaseException):
    """The process ends here: no clean-up of ours runs after it."""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_last_k_stay(runs: SimpleNamespace, tmp_path: Path) -> None:
    with runs.build(device="cpu") as engine:
        for _ in range(4):
            runs.train(engine, 1)
            engine.save(tmp_path, keep=2)
        assert names(tmp_path) == ["step-000003", "step-000004"]
        engine.resume(tmp_path / "step-000003")
        engine.save(tmp_path, keep=2)  # the last saved is the newest, whatever its number
        assert names(tmp_path) == ["step-000003", "step-000004"]
        assert RunFolder(tmp_path).newest().name == "step-000003"
        runs.train(engine, 3)
        engine.save(tmp_path, keep=1)
        assert names(tmp_path) == ["step-000006"]


def test_a_run_removes_nothing_of_another_one(runs: SimpleNamespace, tmp_path: Path) -> None:
    """A second run that is given the same folder begins at step 0 again; another model has no place there."""
    with runs.build(device="cpu") as engine:
        runs.train(engine, 3)
        engine.save(tmp_path)
    with runs.build(device="cpu") as engine:
        runs.train(engine, 1)
        engine.save(tmp_path, keep=1)
    assert names(tmp_path) == ["step-000001", "step-000003"]
    words = r"checkpoints of another model: step-00000\d differs in .* a folder of its own"
    config = OffloadConfig(device="cpu", host_memory="64MiB")
    with OffloadEngine(nn.Linear(4, 4), SGD(), config) as other, pytest.raises(CheckpointError, match=words):
        other.save(tmp_path, keep=1)
    assert names(tmp_path) == ["step-000001", "step-000003"]


def test_a_damaged_one_is_neither_counted_nor_removed(runs: SimpleNamespace, tmp_path: Path) -> None:
    with runs.build(device="cpu") as engine:
        for _ in range(3):
            runs.train(engine, 1)
            engine.save(tmp_path)
        (tmp_path / "step-000003" / "model-00001.safetensors").unlink()
        (tmp_path / "notes").mkdir()
        runs.train(engine, 1)
        engine.save(tmp_path, keep=2)
    assert names(tmp_path) == ["notes", "step-000002", "step-000003", "step-000004"]


def test_a_checkpoint_of_the_same_step_is_replaced(runs: SimpleNamespace, tmp_path: Path) -> None:
    with runs.build(device="cpu") as engine:
        engine.save(tmp_path, data=1)
        path = engine.save(tmp_path, data=2)
        assert names(tmp_path) == ["step-000000"]
        assert verify(path) == []
        assert engine.resume(path).data == 2


@pytest.mark.parametrize("point", range(12))
def test_killed_at_every_point_of_a_save(
    runs: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: int
) -> None:
    """Each rename, removal and flush of a save that replaces one checkpoint and drops another is the last once."""
    with runs.build(device="cpu") as engine:
        for _ in range(2):
            runs.train(engine, 1)
            engine.save(tmp_path)
        calls = 0

        def counted(original):  # type: ignore[no-untyped-def]
            def call(*args, **kwargs):  # type: ignore[no-untyped-def]
                nonlocal calls
                calls += 1
                if calls > point:
                    raise Killed
                return original(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", counted(Path.rename))
            patch.setattr(folder_module, "sync", counted(folder_module.sync))
            patch.setattr(shutil, "rmtree", counted(shutil.rmtree))
            try:
                engine.save(tmp_path, keep=1, data="new")
                finished = True
            except Killed:
                finished = False
        assert finished == (point >= 8)  # two flushes, two renames, a removal; one rename, a flush and a removal
        resumed = engine.resume(tmp_path)
        assert resumed.step == 2
        assert resumed.data in (None, "new")
        assert verify(resumed.path) == []
        engine.save(tmp_path, keep=1, data="newer")
        assert names(tmp_path) == ["step-000002"]
        assert engine.resume(tmp_path).data == "newer"


def test_two_runs_do_not_save_into_one_folder(runs: SimpleNamespace, tmp_path: Path) -> None:
    with runs.build(device="cpu") as engine:
        with RunFolder(tmp_path).saving(), pytest.raises(CheckpointError, match="another run is saving into"):
            engine.save(tmp_path)
        assert verify(engine.save(tmp_path)) == []


def test_a_checkpoint_can_be_moved_and_copied(runs: SimpleNamespace, tmp_path: Path) -> None:
    with runs.build(frozen=True, device="cpu") as engine:
        runs.train(engine, 1)
        path = engine.save(tmp_path / "run")
        expected = runs.snapshot(engine)
    shutil.copytree(path, tmp_path / "kept")
    shutil.rmtree(tmp_path / "run")
    os.rename(tmp_path / "kept", tmp_path / "elsewhere")
    with runs.build(seed=2, frozen=True, device="cpu") as engine:
        engine.resume(tmp_path / "elsewhere")
        assert runs.differing(runs.snapshot(engine), expected) == []


def test_what_lost_its_name_to_an_heir_that_never_came_gets_it_back(runs: SimpleNamespace, tmp_path: Path) -> None:
    with runs.build(device="cpu") as engine:
        path = engine.save(tmp_path, data="old")
        path.rename(tmp_path / ".step-000000.replaced")
        assert engine.resume(tmp_path).data == "old"
        runs.train(engine, 1)
        engine.save(tmp_path)
        assert names(tmp_path) == ["step-000000", "step-000001"]
        assert verify(path) == []


def test_folders_above_are_flushed_too(runs: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a loss of power takes a new run's folder with the checkpoint in it."""
    flushed = []
    monkeypatch.setattr(folder_module, "sync", flushed.append)
    with RunFolder(tmp_path / "a" / "b").saving():
        assert set(flushed) == {tmp_path, tmp_path / "a"}
    flushed.clear()
    with RunFolder(tmp_path / "a" / "b").saving():
        assert flushed == []
