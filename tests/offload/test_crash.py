"""Every finished step survives `kill -9`: masters, moments, counts, statistics and the next step's random numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HARNESS = Path(__file__).with_name("crash_harness.py")


def kills(num_kills: int, seed: int, folder: Path, limit_s: float) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-P", str(HARNESS), str(num_kills), str(seed), str(folder)],
        capture_output=True,
        text=True,
        timeout=limit_s,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(report: dict[str, object], num_kills: int) -> None:
    assert report["wrong"] == []
    phases = report["phases"]
    assert isinstance(phases, dict)
    assert sum(phases.values()) == num_kills
    print(f"phases hit by {num_kills} kills: {phases}")
    for phase in ("fetch", "write", "flush", "after"):
        assert phases.get(phase, 0) >= num_kills / 10, phases


@pytest.mark.timeout(600)
def test_thirty_kills_lose_no_finished_step(tmp_path: Path) -> None:
    check(kills(30, 0, tmp_path, 580), 30)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_thousand_kills_lose_no_finished_step(tmp_path: Path) -> None:
    check(kills(1000, 1, tmp_path, 3500), 1000)
