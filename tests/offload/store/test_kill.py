"""SIGKILL at random moments of a run: every re-open is bit by bit an uninterrupted run at a committed step."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HARNESS = Path(__file__).with_name("kill_harness.py")


@pytest.mark.parametrize(
    ("num_kills", "seed"),
    [(30, 1), pytest.param(1000, 2, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])],
)
def test_every_kill_leaves_a_committed_step(tmp_path, num_kills, seed, capsys):
    command = [sys.executable, "-P", str(HARNESS), str(tmp_path), str(num_kills), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    with capsys.disabled():
        print(f" [{num_kills} kills, by phase: {report['hits']}, last step {report['found'][-1]}]", end="")
    assert sum(report["hits"].values()) == num_kills + 1
    assert min(report["hits"].values()) >= num_kills // 10
    assert report["found"][1:] == sorted(report["found"][1:])
    assert report["found"][-1] >= num_kills // 8  # the run went on between the kills
