"""The comparison with fio is fair: what fio is told, and which of its configurations it may choose from."""

import json
import subprocess
from types import SimpleNamespace

import pytest

from offload.bench import drive
from offload.bench.cli import main


@pytest.fixture
def told(monkeypatch):
    commands = []

    def run(command, **options):
        commands.append(command)
        job = {"read": {"bw_bytes": 2e9}, "write": {"bw_bytes": 1e9}}
        return SimpleNamespace(returncode=0, stdout="note\n" + json.dumps({"jobs": [job]}), stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_every_job_of_fio_has_its_own_part_of_the_file(told, tmp_path):
    assert drive.fio_gb_s(tmp_path / "f", 1 << 30, "read", ["--ioengine=psync", "--numjobs=4", "--bs=1m"], 0.5) == 3.0
    assert {f"--size={1 << 28}", f"--offset_increment={1 << 28}", "--time_based", "--runtime=500ms"} <= set(told[0])
    drive.fio_gb_s(tmp_path / "f", 1 << 30, "write", ["--ioengine=libaio", "--bs=1m"], None)
    assert f"--size={1 << 30}" in told[1] and "--time_based" not in told[1]


def test_fio_may_choose_from_the_whole_matrix():
    large = {tuple(engine) for engine in drive.fio_engines("large")}
    assert len(large) == (3 + 2 * 4) * 5
    for engine in ("psync", "libaio", "io_uring"):
        for size in ("128k", "8m"):
            assert any(f"--ioengine={engine}" in place and f"--bs={size}" in place for place in large)
    assert all("--bs=4k" in place for place in drive.fio_engines("random 4k"))
    assert len(drive.fio_engines("random 4k")) == 3 + 2 * 4


def test_an_unknown_case_is_refused_before_anything_is_made(tmp_path, capsys):
    assert main(["bench", "drive", str(tmp_path / "d"), "--case", "backwards"]) == 2
    assert "sequential read" in capsys.readouterr().err
    assert not (tmp_path / "d").exists()
