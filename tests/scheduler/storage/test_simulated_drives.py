"""The in-memory and the paced backend: exact bytes, exact simulated times."""

import threading
from pathlib import Path

import pytest

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


@pytest.mark.parametrize(("duplex", "ends_s"), [(True, 4.0), (False, 6.0)])
def test_duplex_drives_serve_both_directions_at_once(duplex, ends_s):
    backend, _ = paced(Pace(read_gb_s=2e-6, write_gb_s=1e-6, duplex=duplex))
    assert backend._book("read", 4000) == pytest.approx(2.0)
    assert backend._book("write", 4000) == pytest.approx(ends_s)
    assert backend._book("read", 4000) == pytest.approx(4.0 if duplex else 8.0)


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


@pytest.mark.parametrize("bad", [{"read_gb_s": 0}, {"write_gb_s": -1}, {"depth": 0}, {"jitter": 1}, {"latency_s": -1}])
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
