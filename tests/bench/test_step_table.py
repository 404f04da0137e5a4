"""The step table: what it expects of each placement, and one real run of every case."""

import json
from pathlib import Path

import pytest

from offload.bench.cli import main
from offload.bench.models.gpt import preset
from offload.bench.step_table import expected_nbytes


@pytest.mark.parametrize(
    ("case", "dtype", "expected"),
    [
        ("plain", "bfloat16", (0, 0)),
        ("memory", "bfloat16", (0, 0)),
        ("states-nvme", "bfloat16", (10, 10)),  # split master, high half in memory
        ("nvme", "bfloat16", (16, 14)),  # split master on NVMe 14 + 12, gradient spilled in 16 bit 2 + 2
        ("states-nvme", "float32", (8, 8)),
        ("nvme", "float32", (20, 16)),
    ],
)
def test_expected_bytes_per_parameter(case: str, dtype: str, expected: tuple[int, int]) -> None:
    assert expected_nbytes(case, dtype) == expected


def test_every_case_runs_in_its_own_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "step.json"
    flags = ["--model", "tiny", "--batch", "1", "--seq", "32", "--rounds", "1", "--steps", "2", "--dtype", "float32"]
    flags += ["--rig", "cores-2"]
    assert main(["bench", "step", *flags, "--nvme", str(tmp_path), "--json", str(path)]) == 0
    written = json.loads(path.read_text())
    rows = {row["case"]: row for row in written["rows"]}
    assert list(rows) == ["plain", "memory", "states-nvme", "nvme"]
    losses = {row["last_loss"] for case, row in rows.items() if case != "plain"}
    assert len(losses) == 1  # same bits wherever the bytes were
    assert rows["plain"]["last_loss"] == pytest.approx(losses.pop(), rel=1e-5)
    for case, row in rows.items():
        assert row["tokens_per_s"] > 0
        assert row["peak_rss_nbytes"] > row["baseline_rss_nbytes"] > 0
        # Parameters that are still staged are not read again: here the window holds them all, which saves both reads.
        saved = 8 if case == "nvme" else 0
        assert row["read_per_parameter"] == pytest.approx(row["expected_read"] - saved, rel=0.05), case
        assert row["write_per_parameter"] == pytest.approx(row["expected_write"], rel=0.05), case
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step.json"]  # every folder is gone again
    # Both cores compute and update (2.5e8 parameters per second and core): no step can be shorter.
    (plain,) = (process["compute_s"] for process in written["processes"] if process["case"] == "plain")
    busy_s = sum(sum(step) for step in plain) / len(plain) + preset("tiny").num_parameters / 5e8
    assert rows["memory"]["bound_s"] == pytest.approx(busy_s, rel=0.05)
    assert rows["memory"]["bound_lane"] == "cpu"
    assert rows["plain"]["bound_s"] is None
    shown = capsys.readouterr().out
    assert shown.count("\n| ") == 5
    assert "commit" in shown
