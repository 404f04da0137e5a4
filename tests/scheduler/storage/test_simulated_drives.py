"""The in-memory and the paced backend: exact bytes, exact simulated times."""

import threading
from pathlib import Path

import pytest

from offload.scheduler.rig import DriveSpeed
from offload.scheduler.storage import (
    MemoryBackend,
    NoSpace,
    Pace,
    PacedBackend,
    read_fully,
    write_fully,
)

GB = 10**9


class FakeTime:
    """A clock that moves only when somebody sleeps."""

    def __init__(self):
        self.now_s = 0.0
        self.slept = []

    def clock(self):
        return self.now_s

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now_s += seconds


def paced(pace, **files):
    time = FakeTime()
    inner = MemoryBackend(Path("m"), files=files or {"f": bytes(4000)})
    return PacedBackend(inner, pace, clock=time.clock, sleep=time.sleep), time


def test_transfers_take_bytes_over_bandwidth_plus_latency():
    backend, time = paced(Pace(read_gb_s=2e-6, write_gb_s=1e-6, latency_s=0.25))
    file = backend.open("f")
    read_fully(file, memoryview(bytearray(4000)), 0)
    assert time.now_s == pytest.approx(4000 / 2e3 + 0.25)
    write_fully(file, memoryview(bytes(3000)), 0)
    assert time.now_s == pytest.approx(2.25 + 3000 / 1e3 + 0.25)


@pytest.mark.parametrize(
    ("law", "mixed_gb_s", "ends_s"),
    [("duplex", None, [2.0, 4.0, 4.0]), ("additive", None, [2.0, 6.0, 8.0]), ("mixed", 4e-6, [1.0, 2.0, 3.0])],
)
def test_a_drive_serves_both_directions_by_its_law(law, mixed_gb_s, ends_s):
    backend, _ = paced(Pace(read_gb_s=2e-6, write_gb_s=1e-6, law=law, mixed_gb_s=mixed_gb_s))
    ends = [backend._book(direction, 4000) for direction in ("read", "write", "read")]
    assert ends == pytest.approx(ends_s)


@pytest.mark.parametrize("law", ["duplex", "additive", "mixed"])
@pytest.mark.parametrize(("num_reads", "num_writes"), [(6, 0), (0, 6), (5, 3)])
def test_a_backlog_takes_as_long_as_the_rig_says(law, num_reads, num_writes):
    speeds = {"read_gb_s": 2e-6, "write_gb_s": 1e-6, "law": law, "mixed_gb_s": 1.5e-6 if law == "mixed" else None}
    backend, _ = paced(Pace(**speeds))
    ends = [backend._book(way, 1000) for way in ["read"] * num_reads + ["write"] * num_writes]
    drive = DriveSpeed(**speeds, latency_s=0.0, depth=1)
    assert max(ends) == pytest.approx(drive.service_s(1000 * num_reads, 1000 * num_writes))


@pytest.mark.parametrize(("law", "apart"), [("duplex", True), ("additive", False)])
def test_writes_take_the_places_of_reads_only_where_they_share_a_channel(law, apart):
    backend, _ = paced(Pace(read_gb_s=1, write_gb_s=1, depth=1, law=law))
    reader = threading.Thread(target=backend.serve, args=("read", lambda: 1, 1), daemon=True)
    waiting = []

    def while_writing():
        reader.start()
        reader.join(20 if apart else 0.1)
        waiting.append(reader.is_alive())
        return 1

    backend.serve("write", while_writing, 1)
    reader.join(20)
    assert waiting == [not apart]


def test_all_files_share_the_drive():
    backend, time = paced(Pace(read_gb_s=1e-6, write_gb_s=1e-6), a=bytes(1000), b=bytes(1000))
    backend._book("read", 1000)  # somebody else's request in service
    read_fully(backend.open("b"), memoryview(bytearray(1000)), 0)
    assert time.now_s == pytest.approx(2.0)


def test_an_idle_drive_saves_nothing_up():
    backend, time = paced(Pace(read_gb_s=1e-6, write_gb_s=1e-6))
    time.now_s = 100.0
    assert backend._book("read", 1000) == pytest.approx(101.0)


def test_jitter_is_bounded_and_reproducible():
    ends = []
    for _ in range(2):
        backend, _ = paced(Pace(read_gb_s=1e-6, write_gb_s=1e-6, jitter=0.2, seed=5))
        ends.append([backend._book("read", 1000) for _ in range(50)])
    assert ends[0] == ends[1]
    steps = [right - left for left, right in zip([0.0, *ends[0]], ends[0], strict=False)]
    assert 0.8 <= min(steps) < 0.9 < 1.1 < max(steps) <= 1.2


def test_no_more_than_depth_requests_are_served_at_once():
    inside, peak, lock = [0], [0], threading.Lock()

    class Slow(MemoryBackend):
        def open(self, name, *, create=False):
            file = super().open(name, create=create)
            inner = file.read_into

            def read_into(buffer, offset):
                with lock:
                    inside[0] += 1
                    peak[0] = max(peak[0], inside[0])
                gate.wait(0.01)
                with lock:
                    inside[0] -= 1
                return inner(buffer, offset)

            file.read_into = read_into
            return file

    gate = threading.Event()
    backend = PacedBackend(Slow(Path("m"), files={"f": bytes(64)}), Pace(read_gb_s=100, write_gb_s=100, depth=3))
    file = backend.open("f")
    threads = [threading.Thread(target=read_fully, args=(file, memoryview(bytearray(64)), 0)) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert peak[0] == 3


def test_flush_takes_its_time():
    backend, time = paced(Pace(read_gb_s=1, write_gb_s=1, flush_s=0.5))
    backend.open("f").flush()
    assert time.slept == [0.5]


@pytest.mark.parametrize(
    "bad",
    [
        {"read_gb_s": 0}, {"write_gb_s": -1}, {"depth": 0}, {"jitter": 1}, {"latency_s": -1}, {"law": "fast"},
        {"law": "mixed"}, {"law": "mixed", "mixed_gb_s": 0}, {"mixed_gb_s": 1},
    ],
)  # fmt: skip
def test_impossible_paces_are_refused(bad):
    with pytest.raises(ValueError, match=r"must be|depth >= 1"):
        Pace(**{"read_gb_s": 1, "write_gb_s": 1, **bad})


def test_memory_files_behave_as_files():
    backend = MemoryBackend(Path("m"), capacity_nbytes=100)
    backend.reserve("a", 60)
    with pytest.raises(NoSpace, match="cannot reserve 50 bytes, 40 bytes are free"):
        backend.reserve("b", 50)
    with pytest.raises(FileExistsError):
        backend.reserve("a", 1)
    with pytest.raises(FileNotFoundError):
        backend.open("b")
    file = backend.open("a")
    assert file.write_from(memoryview(b"xyz"), 10) == 3
    buffer = bytearray(60)
    assert file.read_into(memoryview(buffer), 8) == 52
    assert bytes(buffer[:8]) == b"\0\0xyz\0\0\0"
    assert file.read_into(memoryview(buffer), 60) == 0
    backend.rename("a", "c")
    assert (backend.names(), backend.size_nbytes("a"), backend.size_nbytes("c")) == (["c"], None, 60)
    file.close()
    with pytest.raises(OSError, match="closed"):
        file.flush()
    backend.remove("c")
    backend.remove("c")
    assert backend.free_nbytes() == 100
