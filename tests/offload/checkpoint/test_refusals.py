"""What is not this run's checkpoint, or no longer what was saved, is refused by name, and nothing is changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from offload import SGD, Adam, AdamW, CheckpointDamaged, CheckpointError, CheckpointMismatch, CheckpointMissing
from offload.checkpoint.verification import verify


@pytest.fixture(scope="module")
def saved(runs: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    with runs.build(device="cpu") as engine:
        runs.train(engine, 2)
        engine.save(folder / "run")
    return folder / "run"


DIFFERENT: dict[str, tuple[dict[str, Any], list[str]]] = {
    "depth": ({"depth": 2}, [r"parameter blocks\.2\.0\.weight: only in the checkpoint, \(64, 32\) trainable"]),
    "more": ({"depth": 4}, [r"parameter blocks\.3\.0\.weight: only in this run"]),
    "width": ({"width": 16}, [r"parameter blocks\.0\.0\.weight: \(64, 32\) trainable in the checkpoint, \(32, 16\)"]),
    "frozen": (
        {"frozen": True},
        [r"parameter blocks\.0\.3\.bias: \(32,\) trainable in the checkpoint, \(32,\) frozen"],
    ),
    "optimizer": ({"spec": Adam(lr=1e-2)}, [r"optimizer's name: AdamW in the checkpoint, Adam in this run"]),
    "sgd": (
        {"spec": SGD(lr=1e-2, momentum=0.9)},
        [r"optimizer's name: AdamW in the checkpoint, SGD", r"states: \['exp_avg', 'exp_avg_sq'\] in the checkpoint"],
    ),
    "groups": (
        {"spec": AdamW(lr=1e-2, groups=lambda name, _: {"weight_decay": 0.0 if name.endswith("bias") else 0.1})},
        [r"parameter groups: 1 in the checkpoint, 2 in this run"],
    ),
    "average": ({"ema_decay": 0.9}, [r"states of blocks\.0\.0\.weight: exp_avg .* in the checkpoint, ema \(64, 32\)"]),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_another_model_or_optimizer_is_refused(runs: SimpleNamespace, saved: Path, what: str) -> None:
    settings, messages = DIFFERENT[what]
    with runs.build(seed=3, device="cpu", **settings) as engine:
        before = runs.snapshot(engine)
        with pytest.raises(CheckpointMismatch) as refused:
            engine.resume(saved)
        assert runs.differing(runs.snapshot(engine), before) == []
        assert engine.steps_done == 0
        runs.train(engine, 1)
    for message in messages:
        refused.match(message)


def test_a_difference_of_buffers_is_refused(runs: SimpleNamespace, saved: Path) -> None:
    with runs.build(device="cpu") as engine:
        engine.module.register_buffer("seen", torch.zeros(3))
        with pytest.raises(CheckpointMismatch, match=r"buffer seen: none in the checkpoint, \(3,\) torch.float32"):
            engine.resume(saved)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped bit of a master": (
        lambda p: flip(p / "model-00002.safetensors", -9),
        r"model-00002.safetensors is damaged: the checksum of 'blocks\.1",
    ),
    "flipped bit of a moment": (
        lambda p: flip(p / "states-00003.safetensors", 20_000),
        r"states-00003.safetensors is damaged: the checksum of 'blocks\.2.*/exp_avg",
    ),
    "flipped bit of a buffer": (lambda p: flip(p / "buffers.safetensors", -1), r"buffers.safetensors is damaged"),
    "flipped bit of a header": (lambda p: flip(p / "model-00001.safetensors", 40), r"model-00001.safetensors"),
    "a name changed in a header": (
        lambda p: (p / "model-00001.safetensors").write_bytes(
            (p / "model-00001.safetensors").read_bytes().replace(b"blocks.0.0.bias", b"blocks.0.0.bias".swapcase())
        ),
        r"model-00001.safetensors is damaged: its header's checksum",
    ),
    "torn file": (
        lambda p: (p / "states-00001.safetensors").write_bytes((p / "states-00001.safetensors").read_bytes()[:5000]),
        r"states-00001.safetensors has 5000 bytes, 34280 were written",
    ),
    "missing file": (lambda p: (p / "states-00004.safetensors").unlink(), r"states-00004.safetensors is missing"),
    "flipped bit of the document": (lambda p: flip(p / "checkpoint.json", 400), r"checkpoint.json"),
    "torn document": (
        lambda p: (p / "checkpoint.json").write_bytes((p / "checkpoint.json").read_bytes()[:300]),
        r"checkpoint.json is torn \(300 bytes",
    ),
    "missing document": (lambda p: (p / "checkpoint.json").unlink(), r"has (lost its|no) checkpoint.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused(runs: SimpleNamespace, saved: Path, tmp_path: Path, damage: str) -> None:
    shutil.copytree(saved, tmp_path / "run")
    path = tmp_path / "run" / "step-000002"
    assert verify(path) == []
    harm, message = DAMAGES[damage]
    harm(path)
    with runs.build(seed=3, device="cpu") as engine:
        before = runs.snapshot(engine)
        for target in (path, tmp_path / "run"):
            with pytest.raises(CheckpointError, match=message) as refused:
                engine.resume(target)
            assert isinstance(refused.value, (CheckpointDamaged, CheckpointMissing))
        assert runs.differing(runs.snapshot(engine), before) == []
        runs.train(engine, 1)
    assert verify(path) != []


def test_a_damaged_newest_one_is_never_passed_over(runs: SimpleNamespace, saved: Path, tmp_path: Path) -> None:
    with runs.build(device="cpu") as engine:
        older = engine.save(tmp_path)
        runs.train(engine, 1)
        newer = engine.save(tmp_path)
        (newer / "model-00001.safetensors").unlink()
        with pytest.raises(CheckpointDamaged, match=rf"{older} is the last that looks whole"):
            engine.resume(tmp_path)
        assert engine.resume(older).step == 0


def test_nothing_to_resume_is_an_error(runs: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with runs.build(device="cpu") as engine:
        for folder in ("empty", "none"):
            with pytest.raises(CheckpointMissing, match="holds no checkpoint"):
                engine.resume(tmp_path / folder)


def test_another_version_is_refused(runs: SimpleNamespace, saved: Path, tmp_path: Path) -> None:
    from xxhash import xxh3_64_hexdigest

    shutil.copytree(saved, tmp_path / "run")
    path = tmp_path / "run" / "step-000002" / "checkpoint.json"
    body = {**json.loads(path.read_text())["body"], "version": 2}
    text = json.dumps(body, separators=(",", ":"))
    path.write_text(json.dumps({"checksum": xxh3_64_hexdigest(text.encode()), "body": body}))
    with (
        runs.build(device="cpu") as engine,
        pytest.raises(CheckpointDamaged, match="not of format offload-checkpoint 1"),
    ):
        engine.resume(path.parent)


def test_what_json_cannot_hold_is_refused_before_anything_is_made(runs: SimpleNamespace, tmp_path: Path) -> None:
    with runs.build(device="cpu") as engine:
        with pytest.raises(ValueError, match=r"data\.loader is a object"):
            engine.save(tmp_path, data={"loader": object()})
        with pytest.raises(ValueError, match="keep=0"):
            engine.save(tmp_path, keep=0)
        (tmp_path / "file").touch()
        with pytest.raises(ValueError, match="is a file"):
            engine.save(tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
