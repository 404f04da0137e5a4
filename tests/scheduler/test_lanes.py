"""Lanes: blocking work in threads of their own; a cancelled call owns its buffer until the thread is done."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from offload.scheduler.hostmem import allocate_pages
from offload.scheduler.lanes import Lane, Lanes
from offload.scheduler.pool import PAGE_NBYTES, Pool
from offload.scheduler.trace import LANES, Trace

PATIENCE_S = 20


@pytest.fixture
def trace() -> Trace:
    return Trace()


@pytest.fixture
def lane(trace: Trace) -> Iterator[Lane]:
    lane = Lane("read", 1, trace)
    yield lane
    lane.close()


def test_result_exception_and_record(lane: Lane, trace: Trace) -> None:
    async def main() -> None:
        assert await lane.run(lambda a, b: a + b, 2, 3, unit="blocks.0", kind="param", nbytes=40) == 5
        with pytest.raises(ZeroDivisionError):
            await lane.run(lambda: 1 // 0, unit="blocks.1", kind="states", nbytes=2)

    asyncio.run(main())
    spans, waits = trace.drain()
    assert waits == []
    assert [(s.lane, s.unit, s.kind, s.nbytes) for s in spans] == [
        ("read", "blocks.0", "param", 40),
        ("read", "blocks.1", "states", 2),
    ]
    assert all(s.queued_s <= s.start_s <= s.end_s for s in spans)


def test_work_runs_in_the_lanes_own_threads(lane: Lane) -> None:
    async def main() -> set[str]:
        calls = (lane.run(lambda: threading.current_thread().name, unit="u", kind="k", nbytes=0) for _ in range(5))
        return set(await asyncio.gather(*calls))

    names = asyncio.run(main())
    assert len(names) == 1 and names.pop().startswith("offload-read")


def test_no_more_in_service_than_threads(trace: Trace) -> None:
    lane = Lane("cpu", 2, trace)
    lock, inside, most = threading.Lock(), [0], [0]
    both = threading.Barrier(2)

    def work() -> None:
        with lock:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
        both.wait(PATIENCE_S)  # two are in service at once, or this breaks
        with lock:
            inside[0] -= 1

    async def main() -> None:
        await asyncio.gather(*(lane.run(work, unit="u", kind="k", nbytes=0) for _ in range(6)))

    asyncio.run(main())
    lane.close()
    assert most == [2]


def test_cancelled_call_keeps_its_buffer_until_the_thread_is_done(lane: Lane) -> None:
    """Without the shield the call ends at once, its lease is reused, and the thread writes into another's buffer."""
    pool = Pool("test memory", PAGE_NBYTES, allocate_pages)
    begun, go_on = threading.Event(), threading.Event()

    async def transfer() -> None:
        lease = pool.try_acquire(PAGE_NBYTES, "transfer")
        assert lease is not None

        def slow_write() -> None:
            begun.set()
            assert go_on.wait(PATIENCE_S)
            lease.buffer.fill_(7)

        try:
            await lane.run(slow_write, unit="u", kind="k", nbytes=PAGE_NBYTES)
        finally:
            lease.release()

    async def main() -> None:
        task = asyncio.create_task(transfer())
        assert await asyncio.to_thread(begun.wait, PATIENCE_S)
        for _ in range(3):  # also when it is cancelled again and again
            task.cancel()
            await asyncio.sleep(0.02)
            assert not task.done(), "the call ended while its thread still had the buffer"
            assert pool.try_acquire(PAGE_NBYTES, "thief") is None
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, PATIENCE_S)
        lease = pool.try_acquire(PAGE_NBYTES, "next")
        assert lease is not None
        assert (lease.buffer == 7).all(), "the write was over before the buffer changed hands"

    asyncio.run(main())


def test_cancelled_call_that_has_not_begun_never_runs(lane: Lane) -> None:
    ran: list[str] = []
    go_on = threading.Event()

    async def main() -> None:
        first = asyncio.create_task(lane.run(lambda: go_on.wait(PATIENCE_S), unit="u", kind="k", nbytes=0))
        second = asyncio.create_task(lane.run(lambda: ran.append("second"), unit="u", kind="k", nbytes=0))
        await asyncio.sleep(0.01)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(second, PATIENCE_S)
        assert not go_on.is_set()
        go_on.set()
        assert await asyncio.wait_for(first, PATIENCE_S)

    asyncio.run(main())
    assert ran == []


def test_failure_of_a_cancelled_call_is_not_reported_as_unretrieved(lane: Lane) -> None:
    begun, go_on = threading.Event(), threading.Event()
    reports: list[str] = []

    def fail() -> None:
        begun.set()
        go_on.wait(PATIENCE_S)
        raise OSError("drive")

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reports.append(context["message"]))
        task = asyncio.create_task(lane.run(fail, unit="u", kind="k", nbytes=0))
        assert await asyncio.to_thread(begun.wait, PATIENCE_S)
        task.cancel()
        await asyncio.sleep(0)
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        del task

    asyncio.run(main())
    assert reports == []


def test_lanes_of_an_engine() -> None:
    lanes = Lanes(Trace())
    all_lanes = (lanes.read, lanes.write, lanes.h2d, lanes.d2h, lanes.cpu, lanes.compute)
    assert {lane.name for lane in all_lanes} == set(LANES)
    assert (lanes.h2d.num_threads, lanes.d2h.num_threads, lanes.compute.num_threads) == (1, 1, 1)
    lanes.close()
    lanes.close()
