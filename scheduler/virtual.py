"""Virtual time: the engine's coroutines run as they are, on a clock that jumps to the next thing that happens.

Nothing here sleeps and no thread is started. The code that would block in the training thread drives the loop instead
until what it waits for is done, so both sides of the engine run in one thread and every run is the same run.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar, cast

from .lanes import Lane, Lanes
from .loop import LoopThread
from .rig import DriveSpeed
from .trace import Span, Trace

T = TypeVar("T")

_EPSILON_S = 1e-9  # asyncio's own resolution: a timer may fire so much early
_SHOWN_TASKS = 8


class Deadlock(RuntimeError):
    """Somebody waits for what never comes: nothing is ready and no timer runs, or the others run in circles."""


class VirtualLoop(asyncio.BaseEventLoop):
    """An event loop whose `time()` starts at 0 and stands still while anything is ready, then jumps.

    It serves coroutines, futures and timers; it has no sockets, pipes or signals.
    """

    def __init__(self) -> None:
        super().__init__()
        self._now_s = 0.0
        self.turns_left = 0
        self._selector = _Jump(self)

    def time(self) -> float:
        return self._now_s

    def advance(self, seconds: float) -> None:
        self._now_s += seconds

    def waiting(self) -> str:
        """The pending tasks and where each of them stands, for messages."""
        tasks = sorted(asyncio.all_tasks(self), key=lambda task: task.get_name())
        lines = [_described(task) for task in tasks[:_SHOWN_TASKS]]
        if len(tasks) > _SHOWN_TASKS:
            lines.append(f"and {len(tasks) - _SHOWN_TASKS} more")
        return "; ".join(lines) or "no task"

    def _process_events(self, event_list: list[Any]) -> None:
        return

    def _write_to_self(self) -> None:
        return  # there is no other thread to wake the loop from


class _Jump:
    """In the place of a selector: waiting takes no time, the clock moves."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop

    def select(self, timeout: float | None) -> list[Any]:
        if timeout is None:
            raise Deadlock(
                f"virtual time stands still at {self._loop.time():.6f} s: nothing is ready and no timer runs, but "
                f"these wait: {self._loop.waiting()}"
            )
        self._loop.turns_left -= 1
        if self._loop.turns_left < 0:
            raise Deadlock(
                f"at {self._loop.time():.6f} s the virtual loop has run for too long beside somebody who waits; these "
                f"are pending: {self._loop.waiting()}"
            )
        self._loop.advance(max(timeout, 0.0))
        return []


def _described(task: asyncio.Task[Any]) -> str:
    frames = task.get_stack(limit=1)
    where = f" at line {frames[-1].f_lineno} of {frames[-1].f_code.co_filename}" if frames else ""
    return f"{task.get_name()} ({getattr(task.get_coro(), '__qualname__', task.get_coro())}{where})"


class _DrivenFuture(Future[T]):
    """Waiting for it lets virtual time pass until it is done. The time-outs of `Future` mean nothing here."""

    def __init__(self, thread: VirtualLoopThread) -> None:
        super().__init__()
        self._driver = thread

    def result(self, timeout: float | None = None) -> T:
        self._driver.drive(self)
        return super().result(0)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._driver.drive(self)
        return super().exception(0)


class VirtualLoopThread(LoopThread):
    """A `LoopThread` without the thread: whoever waits for a result drives the loop.

    The caller is the simulated training thread. Between its calls no time passes; `sleep` is its compute.

    Args:
        max_turns: turns of the loop that one wait of the caller may take.
    """

    def __init__(self, max_turns: int = 20_000_000) -> None:
        self._max_turns = max_turns
        self._loop: VirtualLoop = VirtualLoop()
        self._closed = False

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._loop.time()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        if self._closed:
            coroutine.close()
            raise RuntimeError("the virtual loop is closed; build a new one")
        task = self._loop.create_task(coroutine)
        future: Future[T] = _DrivenFuture(self)
        task.add_done_callback(lambda done: _hand_over(done, future))
        future.add_done_callback(lambda done: task.cancel() if done.cancelled() else None)
        return future

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        if self._loop.is_running():
            coroutine.close()
            raise RuntimeError("run() inside the virtual loop would wait for itself; await the coroutine there")
        return self.submit(coroutine).result()

    def call_soon(self, callback: Any, *args: Any) -> None:
        if not self._closed:
            self._loop.call_soon(callback, *args)

    def sleep(self, seconds: float) -> None:
        """The caller computes for so long; everything on the loop goes on meanwhile."""
        self.run(asyncio.sleep(seconds))

    def drive(self, future: Future[Any]) -> None:
        """Let time pass until `future` is done. Raises: Deadlock if it never will be."""
        if future.done():
            return
        if self._loop.is_running():
            raise RuntimeError("waiting for a future inside the virtual loop would wait for itself; await it there")
        self._loop.turns_left = self._max_turns
        future.add_done_callback(lambda _: self._loop.stop())
        while not future.done():  # the loop may also be stopped by a future whose waiting was given up
            self._loop.run_forever()

    def semaphore(self, value: int) -> VirtualSemaphore:
        """In the place of a `threading.Semaphore` that the simulated thread blocks on."""
        return VirtualSemaphore(self, value)

    def close(self, grace_s: float = 30.0) -> None:
        """Cancel what still runs, let virtual time pass until it has let go of its buffers, close the loop."""
        if self._closed:
            return
        future = self.submit(self._cancel_all())
        self._closed = True
        try:
            future.result()
        finally:
            self._loop.close()


def _hand_over(task: asyncio.Task[T], future: Future[T]) -> None:
    """Give a task's outcome to the future that the simulated thread holds."""
    if task.cancelled():
        future.cancel()
    elif (error := task.exception()) is not None:
        future.set_exception(error)
    elif not future.cancelled():
        future.set_result(task.result())


class VirtualSemaphore:
    """A semaphore of the simulated thread: `acquire` lets time pass until there is one."""

    def __init__(self, thread: VirtualLoopThread, value: int) -> None:
        self._thread = thread
        self._value = value
        self._freed: Future[None] = Future()

    def acquire(self, blocking: bool = True) -> bool:
        while not self._value:
            if not blocking:
                return False
            self._freed = Future()
            self._thread.drive(self._freed)
        self._value -= 1
        return True

    def release(self) -> None:
        self._value += 1
        if not self._freed.done():
            self._freed.set_result(None)


class Service(Protocol):
    """What a lane leads to: says when a request that starts to be served now will be done."""

    def book(self, now_s: float, args: tuple[Any, ...], kind: str, nbytes: int) -> float:
        """Take the request; returns the virtual second at which it is done, at least `now_s`.

        Args:
            args: what the lane's work function is called with.
        """


class SimulatedLane(Lane):
    """A lane whose calls take the time that `service` says and do nothing: the bytes are not real.

    As on a real lane, a call that has begun ends only with its time, even when cancelled. Every call returns None.
    """

    def __init__(self, name: str, num_threads: int, trace: Trace, service: Service) -> None:
        self.name = name
        self.num_threads = num_threads
        self._trace = trace
        self._service = service
        self._servers = asyncio.Semaphore(num_threads)

    async def run(self, work: Callable[..., T], *args: Any, unit: str, kind: str, nbytes: int) -> T:
        loop = asyncio.get_running_loop()
        queued_s = loop.time()
        async with self._servers:
            start_s = loop.time()
            end_s = self._service.book(start_s, args, kind, nbytes)
            try:
                await _until(loop, end_s)
            finally:
                self._trace.add(Span(self.name, start_s, end_s, unit, kind, nbytes, queued_s))
        return cast(T, None)

    def close(self) -> None:
        return


async def _until(loop: asyncio.AbstractEventLoop, end_s: float) -> None:
    """Return at `end_s`; a cancellation on the way is raised only then."""
    cancelled = False
    while (rest_s := end_s - loop.time()) > _EPSILON_S:
        try:
            await asyncio.sleep(rest_s)
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        raise asyncio.CancelledError


class SimulatedLanes(Lanes):
    """The lanes of one simulated engine, each leading to the service of its name, or nowhere if there is none."""

    def __init__(self, trace: Trace, services: Mapping[str, Service], num_threads: Mapping[str, int]) -> None:
        self.trace = trace
        self.read, self.write, self.h2d, self.d2h, self.cpu = (
            SimulatedLane(name, num_threads[name], trace, services.get(name, _Nowhere(name)))
            for name in ("read", "write", "h2d", "d2h", "cpu")
        )


class _Nowhere:
    def __init__(self, name: str) -> None:
        self._name = name

    def book(self, now_s: float, args: tuple[Any, ...], kind: str, nbytes: int) -> float:
        raise AssertionError(f"the simulated machine has no lane {self._name!r}, but {nbytes} bytes went there")


class Channel:
    """Serves requests one after the other, each in the seconds that `seconds_of(args, kind, nbytes)` says."""

    def __init__(self, seconds_of: Callable[[tuple[Any, ...], str, int], float]) -> None:
        self._seconds_of = seconds_of
        self._busy_until_s = 0.0

    def book(self, now_s: float, args: tuple[Any, ...], kind: str, nbytes: int) -> float:
        self._busy_until_s = max(now_s, self._busy_until_s) + self._seconds_of(args, kind, nbytes)
        return self._busy_until_s


class Servers:
    """Serves every request at once, in its own time: the lane's threads are what limits them."""

    def __init__(self, seconds_of: Callable[[tuple[Any, ...], str, int], float]) -> None:
        self._seconds_of = seconds_of

    def book(self, now_s: float, args: tuple[Any, ...], kind: str, nbytes: int) -> float:
        return now_s + self._seconds_of(args, kind, nbytes)


class Together:
    """Needs all of several services for each request, which is done when the slowest of them is."""

    def __init__(self, *services: Service) -> None:
        self._services = services

    def book(self, now_s: float, args: tuple[Any, ...], kind: str, nbytes: int) -> float:
        return max(service.book(now_s, args, kind, nbytes) for service in self._services)


class SimulatedDrive:
    """A drive with the service law of `DriveSpeed`. Reads and writes reach it through `direction`.

    duplex: a channel for each direction; additive and mixed: one channel for both. Latency is added to every request
    and overlaps with others; at most `depth` requests are served at once, more wait.
    """

    def __init__(self, speed: DriveSpeed) -> None:
        self._speed = speed
        self._busy_until_s: dict[str, float] = {}
        self._in_service: list[float] = []

    def direction(self, name: str) -> Service:
        """The service of the lane "read" or "write"."""
        return _Direction(self, name)

    def book(self, direction: str, now_s: float, nbytes: int) -> float:
        start_s = now_s
        if len(self._in_service) >= self._speed.depth:
            start_s = max(start_s, heapq.heappop(self._in_service))
        channel = direction if self._speed.law == "duplex" else "both"
        moved = (nbytes, 0) if direction == "read" else (0, nbytes)
        served_s = max(start_s, self._busy_until_s.get(channel, 0.0)) + self._speed.service_s(*moved)
        self._busy_until_s[channel] = served_s
        heapq.heappush(self._in_service, served_s + self._speed.latency_s)
        return served_s + self._speed.latency_s


class _Direction:
    def __init__(self, drive: SimulatedDrive, name: str) -> None:
        self._drive = drive
        self._name = name

    def book(self, now_s: float, args: tuple[Any, ...], kind: str, nbytes: int) -> float:
        return self._drive.book(self._name, now_s, nbytes)
