"""Threads are planned and shown, the user's numbers hold, and no number of them changes a bit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from offload import AdamW, OffloadConfig, OffloadEngine


def test_the_plan_uses_every_core_and_the_drives_need() -> None:
    threads = OffloadConfig(device="cpu", nvme=["a", "b"]).plan_threads()
    assert (threads.compute, threads.update, threads.io) == (torch.get_num_threads(), threads.cores, 12)


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ({"updates": 1}, "kinds are 'update', 'io'"),
        ({"compute": 4}, "torch.set_num_threads"),
        ({"io": 0}, "at least 1"),
    ],
)
def test_numbers_that_cannot_be_are_refused(chosen: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        OffloadConfig(threads=chosen)


def test_threads_are_shown_and_change_no_bit(tmp_path: Path, kit: SimpleNamespace) -> None:
    shown: list[str] = []

    def note(engine: OffloadEngine) -> None:
        shown.append(str(engine).splitlines()[-1])

    runs = []
    for number, threads in enumerate([{}, {"update": 1, "io": 1}, {"update": 3, "io": 2}]):
        config = OffloadConfig(
            device="cpu", nvme=tmp_path / f"{number}", homes=kit.ALL_NVME, host_memory="64MiB", threads=threads
        )
        runs.append(kit.engine_run(kit.TinyGPT(), AdamW(lr=1e-2), config, kit.batches(4), check=note))
    for run in runs[1:]:
        kit.assert_same_run(run, runs[0])
    assert "1 update, 1 read, 1 write" in shown[1]
    assert "3 update, 2 read, 2 write" in shown[2]
