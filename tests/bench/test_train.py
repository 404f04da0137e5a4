"""`offload train` on the engine: it learns, its report adds up, and placement does not change a loss."""

import json
import math
from pathlib import Path

import pytest

from offload.bench.cli import main
from offload.bench.train import cosine_with_warm_up

FLAGS = ["train", "--model", "tiny", "--steps", "6", "--batch", "2", "--seq", "64", "--eval-batches", "2"]
NUM_PARAMETERS = 1_820_352


def run(folder: Path, *more: str) -> dict[str, object]:
    path = folder / "run.json"
    assert main([*FLAGS, "--sample-bytes", "8", "--quiet", "--json", str(path), *more]) == 0
    loaded: dict[str, object] = json.loads(path.read_text())
    return loaded


def test_training_from_nvme_learns_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = run(tmp_path, "--nvme", str(tmp_path / "nvme"), "--host-memory", "16MiB", "--dtype", "float32")
    report = whole["report"]
    assert isinstance(report, dict)
    assert report["num_parameters"] == NUM_PARAMETERS
    assert report["steps"] == 6
    assert report["tokens"] == 6 * 2 * 64
    assert abs(report["held_out_before"] - math.log(256)) < 0.3
    assert report["held_out_after"] < report["held_out_before"] - 0.3
    history = report["history"]
    assert [step["step"] for step in history] == [1, 2, 3, 4, 5, 6]
    assert report["first_loss"] == history[0]["loss"]
    assert report["last_loss"] == history[-1]["loss"]
    assert report["nbytes"]["read"] == sum(step["nbytes"]["read"] for step in history)
    assert report["nbytes"]["write"] == sum(step["nbytes"]["write"] for step in history)
    # states are 12 B per parameter and the budget holds less than that: what is missing moves in every step
    assert report["host_budget_nbytes"] == 16 * 2**20
    assert report["host_peak_nbytes"] <= 16 * 2**20
    assert report["nbytes"]["read"] >= 5 * (12 * NUM_PARAMETERS - 16 * 2**20)
    shown = capsys.readouterr().out
    for words in ("held-out loss", "tokens/s", "read from NVMe", "peak RSS", "outside the budget", "Sample:", "def "):
        assert words in shown


def test_placement_changes_no_loss(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    in_memory = run(tmp_path / "a", "--host-memory", "256MiB", "--dtype", "float32")
    on_nvme = run(tmp_path / "b", "--nvme", str(tmp_path / "nvme"), "--host-memory", "16MiB", "--dtype", "float32")
    losses = []
    for whole in (in_memory, on_nvme):
        report = whole["report"]
        assert isinstance(report, dict)
        losses.append([step["loss"] for step in report["history"]] + [report["held_out_after"], report["sample"]])
    assert losses[0] == losses[1]


def test_micro_batches_and_schedule_reach_the_engine(tmp_path: Path) -> None:
    whole = run(tmp_path, "--micro-batches", "3", "--lr", "0.002")
    report = whole["report"]
    assert isinstance(report, dict)
    assert report["tokens"] == 6 * 3 * 2 * 64
    factor = cosine_with_warm_up(6)
    rates = [step["lr"] for step in report["history"]]
    assert rates == pytest.approx([0.002 * factor(index) for index in range(6)], rel=1e-12)


def test_schedule_rises_then_falls_to_a_tenth() -> None:
    factor = cosine_with_warm_up(100)
    assert [factor(0), factor(4), factor(9), factor(10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert factor(55) == pytest.approx(0.55)
    assert factor(100) == pytest.approx(0.1)
    assert cosine_with_warm_up(1)(0) == 1.0
