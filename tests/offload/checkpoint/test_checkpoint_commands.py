"""`offload checkpoint inspect|verify` and the checkpoints of `offload train`."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from offload.bench.cli.main import main


@pytest.fixture
def folder(runs: SimpleNamespace, tmp_path: Path) -> Path:
    with runs.build(frozen=True, device="cpu") as engine:
        engine.save(tmp_path / "run")
        runs.train(engine, 3)
        engine.save(tmp_path / "run", frozen=False)
    return tmp_path / "run"


def test_inspect(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "inspect", str(folder), "--json", str(tmp_path / "a.json")]) == 0
    first, second = json.loads((tmp_path / "a.json").read_text())["checkpoints"]
    assert (first["step"], second["step"]) == (0, 3)
    assert (first["num_left_out"], second["num_left_out"]) == (0, 4)
    assert first["num_parameters"] == 14
    assert first["optimizer"] == "AdamW"
    found = sum(path.stat().st_size for path in (folder / "step-000000").glob("*.safetensors"))
    assert first["nbytes"] == found
    assert "AdamW" in capsys.readouterr().out
    assert main(["checkpoint", "inspect", str(folder / "step-000003")]) == 0


def test_verify(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "verify", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{folder}/step-000000: whole", f"{folder}/step-000003: whole"]
    path = folder / "step-000003" / "model-00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert main(["checkpoint", "verify", str(folder)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "model-00002.safetensors is damaged" in lines[1]
    assert lines[2] == f"{folder}/step-000003: damaged in 1 places"
    assert main(["checkpoint", "verify", str(folder.parent)]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err


def test_train_saves_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Four steps are two, a checkpoint, and two more in another run."""
    (tmp_path / "text").write_bytes(bytes(range(32, 127)) * 400)

    def losses(name: str, *flags: str) -> list[float]:
        report = tmp_path / f"{name}.json"
        common = ["train", "--text", str(tmp_path / "text"), "--batch", "1", "--seq", "16", "--dropout", "0.1"]
        small = ["--eval-batches", "1", "--sample-bytes", "0", "--device", "cpu", "--steps", "4", "--quiet"]
        assert main([*common, *small, "--json", str(report), *flags]) == 0, capsys.readouterr().err
        return [step["loss"] for step in json.loads(report.read_text())["report"]["history"]]

    whole = losses("whole", "--save", str(tmp_path / "run"), "--save-every", "2", "--keep", "2")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["step-000002", "step-000004"]
    assert losses("rest", "--from", str(tmp_path / "run" / "step-000002")) == whole[2:]
    assert main(["train", "--keep", "2"]) == 2
    assert "there is no --save" in capsys.readouterr().err
