"""The lines above every table."""

from pathlib import Path

import torch

from offload.bench.machine import describe
from offload.bench.memory import format_nbytes, peak_rss_nbytes, rss_nbytes


def test_machine_names_what_a_reader_needs(tmp_path: Path) -> None:
    machine = describe(tmp_path)
    text = "\n".join(machine.lines())
    assert torch.__version__ in text
    assert f"{machine.num_cores} cores" in text
    assert machine.num_cores >= 1
    assert machine.ram_nbytes > 2**28
    assert machine.commit
    assert describe().file_system == "none"


def test_rss_counts_touched_pages() -> None:
    slack = 2 * 2**20  # Linux sums its per-CPU counters approximately
    before, peak_before = rss_nbytes(), peak_rss_nbytes()
    block = torch.ones(64 * 2**20, dtype=torch.uint8)
    assert rss_nbytes() - before > 60 * 2**20
    peak = peak_rss_nbytes()
    assert peak >= before + 60 * 2**20
    assert peak >= peak_before - slack
    del block
    assert peak_rss_nbytes() >= peak - slack


def test_bytes_for_people() -> None:
    assert [format_nbytes(n) for n in (9, 12 * 2**20, 3 * 2**29, 2**40, 1023 * 2**20)] == [
        "9 B",
        "12 MiB",
        "1.5 GiB",
        "1 TiB",
        "1023 MiB",
    ]
