"""Progress while the tiers are filled: it counts every byte once, and is quiet unless somebody listens."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from offload import AdamW, FillProgress, OffloadConfig, OffloadEngine
from offload.weights import progress


def test_progress_reaches_the_last_byte(kit: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_EVERY_S", 0.0)
    seen: list[FillProgress] = []
    config = OffloadConfig(device="cpu", nvme=tmp_path, host_memory="64MiB", progress=seen.append)
    with OffloadEngine(kit.TinyGPT(width=96, depth=4, frozen=True), AdamW(lr=1e-2), config):
        pass
    done = [one.done_nbytes for one in seen]
    assert done == sorted(done) and len(done) >= 6
    assert done[-1] == seen[-1].total_nbytes > 0
    assert seen[-1].seconds_left == 0.0


def test_a_terminal_gets_a_line_and_a_pipe_nothing(
    kit: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = OffloadConfig(device="cpu", host_memory="64MiB")
    with OffloadEngine(kit.TinyGPT(), AdamW(lr=1e-2), config):
        assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with OffloadEngine(kit.TinyGPT(), AdamW(lr=1e-2), config):
        lines = capsys.readouterr().err.rstrip("\n").split("\r")
        assert lines[-1].rstrip() == "filling 0.0 of 0.0 GB, 0 s left"


def test_time_left_is_that_of_the_speed_so_far() -> None:
    assert FillProgress(done_nbytes=0, total_nbytes=10, seconds=3.0).seconds_left is None
    half = FillProgress(done_nbytes=6_000_000_000, total_nbytes=24_000_000_000, seconds=10.0)
    assert half.seconds_left == 30.0
    assert progress.describe(half) == "filling 6.0 of 24.0 GB, 30 s left"


def test_a_progress_that_cannot_be_called_is_refused() -> None:
    with pytest.raises(ValueError, match="progress='loud'"):
        OffloadConfig(progress="loud")  # type: ignore[arg-type]
