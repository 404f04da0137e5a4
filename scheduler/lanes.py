"""Lanes: the serial resources of the machine. Blocking work runs in a lane's own threads and is recorded."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from .trace import Span, Trace

T = TypeVar("T")


class Lane:
    """A named executor whose every call leaves one span in the trace.

    Args:
        name: one of `trace.LANES`.
        num_threads: how many calls are in service at once.
    """

    def __init__(self, name: str, num_threads: int, trace: Trace) -> None:
        self.name = name
        self.num_threads = num_threads
        self._trace = trace
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix=f"offload-{name}")

    async def run(self, work: Callable[..., T], *args: Any, unit: str, kind: str, nbytes: int) -> T:
        """Call `work(*args)` in a thread of this lane and return its result; raises what `work` raises.

        Invariant: this coroutine does not end before `work` has ended, not even when it is cancelled. A transfer
        cannot be called back once a thread has begun it, so returning early would let the owner release a buffer
        that the thread still reads or writes.
        """
        job = self._executor.submit(self._timed, time.perf_counter(), unit, kind, nbytes, work, args)
        result = asyncio.wrap_future(job)
        try:
            return await asyncio.shield(result)
        except asyncio.CancelledError:
            if not job.cancel():
                await _until_done(job)
            result.add_done_callback(_retrieve)
            raise

    def _timed(
        self, queued_s: float, unit: str, kind: str, nbytes: int, work: Callable[..., T], args: tuple[Any, ...]
    ) -> T:
        start_s = time.perf_counter()
        try:
            return work(*args)
        finally:
            self._trace.add(Span(self.name, start_s, time.perf_counter(), unit, kind, nbytes, queued_s))

    def close(self) -> None:
        """Wait for calls in service and end the threads."""
        self._executor.shutdown(wait=True, cancel_futures=True)


def _retrieve(result: asyncio.Future[T]) -> None:
    """Look at the outcome of a call whose caller has gone, else asyncio reports it as forgotten."""
    if not result.cancelled():
        result.exception()


async def _until_done(job: Future[T]) -> None:
    """Wait for a job that cannot be cancelled any more, whatever else asks this task to stop; its outcome is moot."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    job.add_done_callback(lambda _: loop.call_soon_threadsafe(ended.set))
    while not job.done():
        try:
            await ended.wait()
        except asyncio.CancelledError:
            continue


class Lanes:
    """The lanes of one engine: `read`, `write`, `h2d`, `d2h`, `cpu`, and `compute` for what runs on the device beside
    the calls of the model, which belong to the training thread."""

    def __init__(self, trace: Trace, *, num_io_threads: int = 4, num_cpu_threads: int = 2) -> None:
        self.trace = trace
        self.read = Lane("read", num_io_threads, trace)
        self.write = Lane("write", num_io_threads, trace)
        self.h2d = Lane("h2d", 1, trace)
        self.d2h = Lane("d2h", 1, trace)
        self.cpu = Lane("cpu", num_cpu_threads, trace)
        self.compute = Lane("compute", 1, trace)

    def close(self) -> None:
        for lane in (self.read, self.write, self.h2d, self.d2h, self.cpu, self.compute):
            lane.close()
