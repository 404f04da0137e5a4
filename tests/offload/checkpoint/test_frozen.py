"""Frozen parameters are written once, and may be left out where the model brings them along."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from offload import CheckpointMismatch
from offload.checkpoint.verification import verify

FROZEN = "frozen-00001.safetensors"


def test_frozen_parameters_are_written_once(runs: SimpleNamespace, tmp_path: Path) -> None:
    """Later checkpoints share the file, until its values change; each stays whole when the others go."""
    with runs.build(frozen=True, device="cpu") as engine:
        first = engine.save(tmp_path)
        runs.train(engine, 1)
        second = engine.save(tmp_path)
        assert (first / FROZEN).stat().st_ino == (second / FROZEN).stat().st_ino
        with engine.gather("blocks.0.0.bias", write=True) as parameters:
            parameters["blocks.0.0.bias"].value.fill_(2.0)
        runs.train(engine, 1)
        third = engine.save(tmp_path)
        assert (third / FROZEN).stat().st_ino != (second / FROZEN).stat().st_ino
        runs.train(engine, 1)
        last = engine.save(tmp_path, keep=1)
        assert [path.name for path in tmp_path.iterdir()] == [last.name]
        assert verify(last) == []
        expected = runs.snapshot(engine)
    with runs.build(seed=4, frozen=True, device="cpu") as engine:
        engine.resume(tmp_path)
        assert runs.differing(runs.snapshot(engine), expected) == []
        runs.train(engine, 1)
        path = engine.save(tmp_path)
        assert verify(path) == []


def test_a_write_during_the_save_is_not_taken_for_what_was_saved(runs: SimpleNamespace, tmp_path: Path) -> None:
    with runs.build(frozen=True, device="cpu") as engine:
        engine.save(tmp_path, background=True)
        with engine.gather("blocks.0.0.bias", write=True) as parameters:
            parameters["blocks.0.0.bias"].value.fill_(2.0)
        runs.train(engine, 1)
        engine.save(tmp_path)
        expected = runs.snapshot(engine)
    with runs.build(seed=4, frozen=True, device="cpu") as engine:
        engine.resume(tmp_path)
        assert runs.differing(runs.snapshot(engine), expected) == []


def test_frozen_parameters_that_are_left_out_must_be_the_same(runs: SimpleNamespace, tmp_path: Path) -> None:
    with runs.build(frozen=True, device="cpu") as engine:
        runs.train(engine, 1)
        path = engine.save(tmp_path, frozen=False)
        assert not (path / FROZEN).exists()
        expected = runs.snapshot(engine)
        runs.train(engine, 1)
        assert not (engine.save(tmp_path, frozen=False) / FROZEN).exists()
        assert verify(engine.save(tmp_path / "all")) == []  # a file is made when one is wanted
    with runs.build(frozen=True, device="cpu") as engine:
        engine.resume(path)
        assert runs.differing(runs.snapshot(engine), expected) == []
    message = r"frozen parameter blocks\.0\.0\.weight: the checkpoint leaves"
    with runs.build(seed=4, frozen=True, device="cpu") as engine, pytest.raises(CheckpointMismatch, match=message):
        engine.resume(path)


def test_frozen_parameters_take_the_dtype_of_the_run(runs: SimpleNamespace, tmp_path: Path) -> None:
    """bf16 values are the same numbers in fp32."""
    import torch

    with runs.build(frozen=True, dtype=torch.bfloat16, device="cpu") as engine:
        engine.save(tmp_path)
        expected = {
            name: tensor.float() for name, tensor in runs.snapshot(engine).items() if name.startswith("blocks.0")
        }
    with runs.build(seed=4, frozen=True, dtype=torch.float32, device="cpu") as engine:
        engine.resume(tmp_path)
        found = {name: tensor.float() for name, tensor in runs.snapshot(engine).items() if name.startswith("blocks.0")}
    assert runs.differing(found, expected) == []
