"""The probe's own arithmetic, without a drive and without a clock."""

import itertools
from pathlib import Path

import pytest

from offload.scheduler.storage import MemoryBackend
from offload.scheduler.storage.probe import CHUNKS, DEPTHS, measure_drive, rate

MIB = 1 << 20


@pytest.fixture
def file():
    backend = MemoryBackend(Path("drive"))
    backend.reserve("f", 8 * MIB)
    return backend.open("f")


def test_threads_that_a_busy_machine_starts_after_the_end_still_measure(file):
    """The clock moves 10 s with every look: 0 sets the end, 10 is the start, each thread looks once, 40 is the end."""
    clock = map(float, itertools.count(0, 10))
    found = rate(file, 8 * MIB, MIB, reads=1, writes=1, seconds=0.1, clock=lambda: next(clock))
    assert found == 2 * MIB / 30 / 1e9


def test_a_probe_reports_one_of_its_candidates_and_removes_its_file():
    backend = MemoryBackend(Path("drive"))
    report = measure_drive(backend, seconds=0.01, file_nbytes=16 * MIB, progress=lambda text: None)
    assert report.chunk_nbytes in CHUNKS and report.depth in DEPTHS
    assert min(report.read_gb_s, report.write_gb_s, report.mixed_gb_s) > 0
    assert backend.names() == []
