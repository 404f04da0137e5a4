"""One drive's queue: order, bounds, no starvation, nothing left over."""

import asyncio
import errno
import random
import threading
from types import SimpleNamespace

import pytest

from offload.scheduler.lanes import Lanes
from offload.scheduler.storage import NEEDED_LATER, NEEDED_NOW, NEEDED_SOON, DriveQueue, DriveStalled
from offload.scheduler.storage import queue as queue_module
from offload.scheduler.trace import Trace


@pytest.fixture
def lanes():
    lanes = Lanes(Trace())
    yield lanes
    lanes.close()


def queue(depth=8, nbytes=1 << 30, lane_depth=4):
    return DriveQueue("drive", depth=depth, max_in_flight_nbytes=nbytes, lane_depth=lane_depth)


def submit(drive, lane, work, *args, nbytes=1, needed=NEEDED_SOON):
    call = drive.run(lane, work, *args, unit="u", kind="k", nbytes=nbytes, needed=needed, label=f"{lane.name} {args}")
    return asyncio.ensure_future(call)


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


def run(coroutine):
    async def bounded():
        return await asyncio.wait_for(coroutine, 30)

    return asyncio.run(bounded())


def test_what_is_needed_sooner_starts_first(lanes):
    order, gate = [], threading.Event()

    async def body():
        drive = queue(lane_depth=1)
        first = submit(drive, lanes.read, gate.wait)
        await settle()
        wanted = [("late", NEEDED_LATER), ("soon 1", NEEDED_SOON), ("now", NEEDED_NOW), ("soon 2", NEEDED_SOON)]
        others = [submit(drive, lanes.read, order.append, name, needed=needed) for name, needed in wanted]
        await settle()
        assert order == []
        gate.set()
        await asyncio.gather(first, *others)

    run(body())
    assert order == ["now", "soon 1", "soon 2", "late"]


def test_a_fetch_overtakes_queued_write_backs(lanes):
    """Depth 2 with one write in service and more queued: the later read goes before the queued writes."""
    order, gate = [], threading.Event()

    async def body():
        drive = queue(depth=1)
        first = submit(drive, lanes.write, gate.wait, needed=NEEDED_LATER)
        writes = [submit(drive, lanes.write, order.append, f"write {i}", needed=NEEDED_LATER) for i in range(3)]
        await settle()
        read = submit(drive, lanes.read, order.append, "read", needed=NEEDED_SOON)
        await read  # though the write in service has not ended: an idle lane always has a place
        assert order == ["read"]
        gate.set()
        await asyncio.gather(first, *writes)

    run(body())
    assert order == ["read", "write 0", "write 1", "write 2"]


def test_reads_and_writes_are_in_flight_together(lanes):
    meeting = threading.Barrier(4)

    async def body():
        drive = queue(depth=4)
        calls = [submit(drive, lane, meeting.wait, 20) for lane in (lanes.read, lanes.write) for _ in range(2)]
        await asyncio.gather(*calls)  # ends only if all four are in service at once

    run(body())


@pytest.mark.parametrize(("depth", "nbytes", "lane_depth"), [(3, 1 << 30, 4), (8, 250, 4), (8, 1 << 30, 2), (1, 1, 1)])
def test_bounds_hold_under_load(lanes, depth, nbytes, lane_depth):
    lock, inside, peak = threading.Lock(), {"read": [], "write": []}, [0, 0, 0]
    chance = random.Random(1)

    def work(lane, size):
        with lock:
            inside[lane].append(size)
            sizes = inside["read"] + inside["write"]
            peak[0] = max(peak[0], len(sizes))
            peak[1] = max(peak[1], sum(sizes) if len(sizes) > 2 else 0)
            peak[2] = max(peak[2], len(inside[lane]))
        for _ in range(200):
            pass
        with lock:
            inside[lane].remove(size)

    async def body():
        drive = queue(depth, nbytes, lane_depth)
        calls = []
        for _ in range(400):
            lane, size = chance.choice([lanes.read, lanes.write]), chance.choice([1, 50, 100, 400])
            needed = chance.choice([NEEDED_NOW, NEEDED_SOON, NEEDED_LATER])
            calls.append(submit(drive, lane, work, lane.name, size, nbytes=size, needed=needed))
        await asyncio.gather(*calls)
        facts = drive.statistics()
        assert (facts.num_queued, facts.num_in_flight, facts.in_flight_nbytes) == (0, 0, 0)

    run(body())
    assert peak[0] <= max(depth, 2)
    assert peak[2] <= lane_depth
    # More than one request per lane only within the byte budget, plus one oversized request of an idle lane.
    assert peak[1] <= nbytes + 400


def test_a_large_request_is_not_starved_by_small_ones(lanes):
    order, gate = [], threading.Event()

    async def body():
        drive = queue(nbytes=100)
        first = submit(drive, lanes.read, gate.wait, nbytes=60)
        big = submit(drive, lanes.read, order.append, "big", nbytes=90)
        small = [submit(drive, lanes.read, order.append, "small", nbytes=10) for _ in range(5)]
        await settle()
        assert order == []
        gate.set()
        await asyncio.gather(first, big, *small)

    run(body())
    assert order[0] == "big"


def test_cancelled_waiters_give_their_place_back(lanes):
    gate = threading.Event()

    async def body():
        drive = queue(lane_depth=1)
        first = submit(drive, lanes.read, gate.wait)
        waiting = [submit(drive, lanes.read, int) for _ in range(3)]
        await settle()
        waiting[0].cancel()
        await settle()
        gate.set()
        await first  # grants waiting[1] in the same turn ...
        waiting[1].cancel()  # ... in which it is cancelled
        assert await waiting[2] == 0
        await asyncio.gather(*waiting, return_exceptions=True)
        assert drive.statistics().num_in_flight == drive.statistics().in_flight_nbytes == 0

    run(body())


def test_a_failing_request_gives_its_place_back(lanes):
    async def body():
        drive = queue(lane_depth=1)
        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                await submit(drive, lanes.read, lambda: 1 // 0)
        assert await submit(drive, lanes.read, int) == 0

    run(body())


def test_refuse_fails_what_waits_and_what_comes_but_not_what_runs(lanes):
    gate = threading.Event()

    async def body():
        drive = queue(lane_depth=1)
        first = submit(drive, lanes.read, gate.wait)
        waiting = submit(drive, lanes.read, int)
        await settle()
        drive.refuse(RuntimeError("closed"))
        with pytest.raises(RuntimeError, match="closed"):
            await waiting
        with pytest.raises(RuntimeError, match="closed"):
            await submit(drive, lanes.read, int)
        gate.set()
        assert await first

    run(body())


def test_statistics_name_the_oldest_request_in_flight(lanes):
    gate = threading.Event()

    async def body():
        drive = queue(lane_depth=2)
        first = submit(drive, lanes.read, gate.wait, 30, nbytes=5)
        await asyncio.sleep(0.002)
        second = submit(drive, lanes.read, gate.wait, 31, nbytes=7)
        third = submit(drive, lanes.read, gate.wait, 32, nbytes=7)
        await settle()
        facts = drive.statistics()
        assert (facts.oldest, facts.num_in_flight, facts.num_queued, facts.in_flight_nbytes) == ("read (30,)", 2, 1, 12)
        assert facts.oldest_s > 0.001
        gate.set()
        await asyncio.gather(first, second, third)

    run(body())


@pytest.mark.parametrize("bad", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_bounds_below_one_are_refused(bad):
    with pytest.raises(ValueError, match="must all be at least 1"):
        queue(*bad)


def test_what_waits_behind_a_request_that_does_not_end_raises_and_the_request_goes_on(lanes, caplog):
    gate = threading.Event()

    async def body():
        drive = DriveQueue("drive", depth=1, max_in_flight_nbytes=100, lane_depth=1, stall_s=0.05)
        stuck = submit(drive, lanes.read, gate.wait, 20, nbytes=30)
        waiting = [submit(drive, lanes.read, int, nbytes=7) for _ in range(2)]
        with pytest.raises(DriveStalled, match="30 bytes") as caught:
            await waiting[0]
        with pytest.raises(DriveStalled, match="1 requests with 30 bytes in flight, 2 waiting"):
            await waiting[1]
        assert (caught.value.oldest, caught.value.errno) == ("read (20,)", errno.ETIMEDOUT)
        assert caught.value.age_s >= 0.05
        assert "drive has not answered" in caplog.text
        late = submit(drive, lanes.read, int)
        await settle()
        assert isinstance(late.exception(), DriveStalled)  # whatever comes now does not wait as long again
        assert await submit(drive, lanes.write, int) == 0  # an idle lane tries
        assert not stuck.done() and drive.statistics().num_in_flight == 1
        gate.set()
        assert await stuck
        assert await submit(drive, lanes.read, int) == 0

    run(body())


def test_a_drive_that_answers_is_not_stalled_however_long_its_queue(lanes, monkeypatch):
    """On a clock set by hand: a request counts from when the drive got it, not from when it was asked for."""
    now, gates = [0.0], [threading.Event(), threading.Event()]
    monkeypatch.setattr(queue_module, "time", SimpleNamespace(monotonic=lambda: now[0]))

    async def body():
        drive = DriveQueue("drive", depth=1, max_in_flight_nbytes=100, lane_depth=1, stall_s=120.0)
        first, second = (submit(drive, lanes.read, gate.wait, 20) for gate in gates)
        third = submit(drive, lanes.read, int)
        await settle()
        now[0] = 119.0
        drive._look()
        gates[0].set()
        await first
        now[0] = 200.0
        drive._look()
        await settle()
        assert not second.done() and not third.done()
        now[0] = 239.0
        drive._look()
        with pytest.raises(DriveStalled, match=r"not answered for 120\.0 s"):
            await third
        gates[1].set()
        await second

    run(body())


def test_without_a_limit_nobody_gives_up(lanes):
    gate = threading.Event()

    async def body():
        drive = queue(lane_depth=1)
        calls = [submit(drive, lanes.read, gate.wait, 20) for _ in range(2)]
        await settle()
        assert drive._watch is None
        gate.set()
        await asyncio.gather(*calls)

    run(body())
    with pytest.raises(ValueError, match="stall_s 0 must be above 0"):
        DriveQueue("drive", depth=1, max_in_flight_nbytes=1, lane_depth=1, stall_s=0)


def test_a_cancelled_request_ends_only_with_its_thread(lanes):
    gate, begun, ended = threading.Event(), threading.Event(), []

    def work():
        begun.set()
        gate.wait(20)
        ended.append(1)

    async def body():
        drive = queue()
        call = submit(drive, lanes.read, work)
        while not begun.is_set():  # noqa: ASYNC110 - set in another thread
            await asyncio.sleep(0.001)
        for _ in range(3):
            call.cancel()
            await asyncio.sleep(0.005)
        assert not call.done()
        gate.set()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert ended == [1]
        assert drive.statistics().num_in_flight == 0

    run(body())
