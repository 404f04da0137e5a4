"""Virtual time: the clock jumps, blocking drives it, standing still for ever is an error, lanes take what they say."""

import asyncio
import time

import pytest

from offload.scheduler.loop import LoopThread
from offload.scheduler.rig import DriveSpeed
from offload.scheduler.trace import Trace
from offload.scheduler.virtual import (
    Channel,
    Deadlock,
    Servers,
    SimulatedDrive,
    SimulatedLane,
    VirtualLoopThread,
)

NOTHING: tuple[object, ...] = ()


def drive(law: str, *, latency_s: float = 0.0, depth: int = 64) -> SimulatedDrive:
    mixed = 4.0 if law == "mixed" else None
    return SimulatedDrive(
        DriveSpeed(read_gb_s=2.0, write_gb_s=1.0, law=law, latency_s=latency_s, depth=depth, mixed_gb_s=mixed)
    )


def seconds(_args: object, _kind: str, nbytes: int) -> float:
    return float(nbytes)


async def use(lane: SimulatedLane, nbytes: int) -> float:
    await lane.run(lambda: 1 / 0, unit="u", kind="k", nbytes=nbytes)
    return asyncio.get_running_loop().time()


# -- the loop


def test_a_day_passes_at_once_and_timers_fire_in_their_order() -> None:
    seen = []

    async def sleeper(seconds: float) -> None:
        await asyncio.sleep(seconds)
        seen.append((seconds, asyncio.get_running_loop().time()))

    thread = VirtualLoopThread()
    began_s = time.perf_counter()
    futures = [thread.submit(sleeper(seconds)) for seconds in (86400.0, 0.5, 3.25)]
    assert thread.time() == 0.0
    for future in futures:
        future.result()
    assert time.perf_counter() - began_s < 5.0, "virtual seconds were slept for"
    assert seen == [(0.5, 0.5), (3.25, 3.25), (86400.0, 86400.0)]
    assert thread.time() == 86400.0
    thread.close()


def test_what_was_submitted_goes_on_while_the_caller_computes() -> None:
    async def two_sleeps() -> float:
        await asyncio.sleep(1.0)
        await asyncio.sleep(1.5)
        return asyncio.get_running_loop().time()

    thread = VirtualLoopThread()
    future = thread.submit(two_sleeps())
    thread.sleep(10.0)
    assert future.done()
    assert (future.result(), thread.time()) == (2.5, 10.0)
    thread.close()


def test_results_and_exceptions_are_those_of_the_coroutine() -> None:
    async def fails() -> None:
        await asyncio.sleep(1.0)
        raise KeyError("lost")

    thread = VirtualLoopThread()
    assert thread.run(asyncio.sleep(2.0, "done")) == "done"
    future = thread.submit(fails())
    assert isinstance(future.exception(), KeyError)
    with pytest.raises(KeyError, match="lost"):
        future.result()
    thread.close()


def test_cancelling_the_future_cancels_the_coroutine() -> None:
    ended = []

    async def long() -> None:
        try:
            await asyncio.sleep(100.0)
        finally:
            ended.append(asyncio.get_running_loop().time())

    thread = VirtualLoopThread()
    future = thread.submit(long())
    thread.sleep(1.0)
    future.cancel()
    thread.sleep(1.0)
    assert ended == [1.0]
    thread.close()


def test_standing_still_for_ever_names_who_waits() -> None:
    async def stuck_in_the_mud() -> None:
        await asyncio.get_running_loop().create_future()

    thread = VirtualLoopThread()
    future = thread.submit(stuck_in_the_mud())
    thread.sleep(2.0)  # somebody else's timer runs: time does not stand still
    with pytest.raises(Deadlock, match=r"(?s)2\.000000 s.*stuck_in_the_mud at line \d+"):
        future.result()
    thread.close()


def test_waiting_inside_the_loop_is_refused() -> None:
    thread = VirtualLoopThread()

    async def waits_for_itself() -> None:
        thread.submit(asyncio.sleep(1.0)).result()

    with pytest.raises(RuntimeError, match="await it there"):
        thread.run(waits_for_itself())
    thread.close()


def test_close_lets_go_and_refuses_what_comes_later() -> None:
    ended = []

    async def holds_on() -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            await asyncio.sleep(1.0)
            ended.append(True)

    thread: LoopThread = VirtualLoopThread()
    thread.submit(holds_on())
    thread.run(asyncio.sleep(0.0))
    thread.close()
    thread.close()
    assert ended == [True]
    assert thread.closed
    with pytest.raises(RuntimeError, match="closed"):
        thread.submit(asyncio.sleep(0.0))


def test_a_semaphore_lets_time_pass_until_it_is_free() -> None:
    thread = VirtualLoopThread()
    slots = thread.semaphore(1)
    assert slots.acquire()
    assert not slots.acquire(blocking=False)

    async def release_later() -> None:
        await asyncio.sleep(3.0)
        slots.release()

    thread.submit(release_later())
    assert slots.acquire()
    assert thread.time() == 3.0
    with pytest.raises(Deadlock):
        slots.acquire()
    thread.close()


# -- lanes


def test_a_channel_serves_one_after_the_other_and_servers_all_at_once() -> None:
    for service, num_threads, expected in (
        (Channel(seconds), 4, [2.0, 5.0, 9.0]),
        (Servers(seconds), 4, [2.0, 3.0, 4.0]),
        (Servers(seconds), 2, [2.0, 3.0, 6.0]),  # the third call begins when the first thread is free
    ):
        thread, trace = VirtualLoopThread(), Trace()
        lane = SimulatedLane("read", num_threads, trace, service)
        futures = [thread.submit(use(lane, nbytes)) for nbytes in (2, 3, 4)]
        assert [future.result() for future in futures] == expected
        spans, _ = trace.drain()
        assert [(span.end_s, span.queued_s, span.nbytes) for span in spans] == [
            (end_s, 0.0, nbytes) for end_s, nbytes in zip(expected, (2, 3, 4), strict=True)
        ]
        thread.close()


def test_a_call_in_service_ends_with_its_time_although_cancelled_and_a_queued_one_at_once() -> None:
    thread, trace = VirtualLoopThread(), Trace()
    lane = SimulatedLane("read", 1, trace, Servers(seconds))
    ended = {}

    async def call(name: str) -> None:
        try:
            await use(lane, 10)
        finally:
            ended[name] = asyncio.get_running_loop().time()

    serving, queued = thread.submit(call("serving")), thread.submit(call("queued"))
    thread.sleep(1.0)
    serving.cancel()
    queued.cancel()
    thread.sleep(20.0)
    assert ended == {"queued": 1.0, "serving": 10.0}
    assert [(span.start_s, span.end_s) for span in trace.drain()[0]] == [(0.0, 10.0)]
    thread.close()


# -- the drive's law. 2 GB/s reads, 1 GB/s writes, 4 GB/s mixed


@pytest.mark.parametrize(
    ("law", "read_s", "write_s"), [("duplex", 2.0, 3.0), ("additive", 2.0, 5.0), ("mixed", 1.0, 1.75)]
)
def test_reads_and_writes_share_the_drive_by_its_law(law: str, read_s: float, write_s: float) -> None:
    one = drive(law)
    assert one.direction("read").book(0.0, NOTHING, "", 4_000_000_000) == read_s
    assert one.direction("write").book(0.0, NOTHING, "", 3_000_000_000) == write_s


def test_latency_overlaps_and_no_more_than_depth_requests_are_served_at_once() -> None:
    one = drive("duplex", latency_s=0.5, depth=2)
    ends = [one.book("read", 0.0, 200_000_000) for _ in range(4)]
    # 0.1 s of channel each. The third waits for the first to leave (0.6), the fourth for the second (0.7).
    assert ends == pytest.approx([0.6, 0.7, 1.2, 1.3])
    deep = drive("duplex", latency_s=0.5, depth=4)
    assert [deep.book("read", 0.0, 200_000_000) for _ in range(4)] == pytest.approx([0.6, 0.7, 0.8, 0.9])
