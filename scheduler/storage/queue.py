"""One queue per drive: what is needed sooner goes first, and only so much is in flight."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from ..lanes import Lane
from .errors import DriveStalled

log = logging.getLogger(__name__)

T = TypeVar("T")

NEEDED_NOW = 0  # somebody stands still for these bytes
NEEDED_SOON = 10  # a prefetch
NEEDED_LATER = 20  # a write-back that nobody waits for
NEEDED_AT_COMMIT = 30  # a copy that only the next commit wants


@dataclass(frozen=True, kw_only=True)
class QueueStatistics:
    """A frozen snapshot of one drive's queue."""

    name: str
    num_queued: int
    num_in_flight: int
    in_flight_nbytes: int
    peak_in_flight_nbytes: int
    oldest_s: float
    oldest: str


class _Ticket:
    __slots__ = ("granted", "label", "lane", "nbytes", "since_s")

    def __init__(self, lane: str, nbytes: int, label: str, granted: asyncio.Future[None]) -> None:
        self.lane = lane
        self.nbytes = nbytes
        self.label = label
        self.granted = granted
        self.since_s = time.monotonic()


class DriveQueue:
    """Orders the requests of one drive. Used on one event loop only.

    Guarantees:
        - at most `depth` requests and `max_in_flight_nbytes` bytes are in flight, except that an idle lane may always
          have one (so a request larger than the budget, or a lane behind a busy one, still moves);
        - among queued requests the one with the smallest `needed` starts first, first come first served within;
        - a request of one lane does not wait because the other lane's threads are all taken;
        - when a request has been in flight for `stall_s`, those that wait for their turn raise DriveStalled. It itself
          goes on: a thread may still use its buffer, which must not be given back before.
    """

    def __init__(
        self, name: str, *, depth: int, max_in_flight_nbytes: int, lane_depth: int, stall_s: float | None = None
    ) -> None:
        if min(depth, max_in_flight_nbytes, lane_depth) < 1:
            raise ValueError(
                f"queue of {name}: depth {depth}, in-flight bytes {max_in_flight_nbytes} and lane depth {lane_depth} "
                f"must all be at least 1"
            )
        if stall_s is not None and stall_s <= 0:
            raise ValueError(f"queue of {name}: stall_s {stall_s} must be above 0, or None to wait for ever")
        self.name = name
        self.depth = depth
        self.lane_depth = lane_depth
        self.max_in_flight_nbytes = max_in_flight_nbytes
        self.stall_s = stall_s
        self._watch: asyncio.TimerHandle | None = None
        self._waiting: dict[str, list[tuple[int, int, _Ticket]]] = {}
        self._order = itertools.count()
        self._in_flight: dict[_Ticket, None] = {}
        self._num_by_lane: dict[str, int] = {}
        self._in_flight_nbytes = 0
        self._peak_nbytes = 0
        self._refusal: Exception | None = None

    async def run(
        self, lane: Lane, work: Callable[..., T], *args: Any, unit: str, kind: str, nbytes: int, needed: int,
        label: str,
    ) -> T:  # fmt: skip
        """Call `work(*args)` on `lane` when it is this request's turn; raises what `work` raises.

        Raises: the exception given to `refuse`, if the queue was closed before the request began; DriveStalled.
        """
        ticket = await self._enter(lane.name, nbytes, needed, label)
        try:
            # Even when cancelled this ends only with its thread: the buffer and the place are in use until then.
            return await lane.run(work, *args, unit=unit, kind=kind, nbytes=nbytes)
        finally:
            self._leave(ticket)

    async def _enter(self, lane: str, nbytes: int, needed: int, label: str) -> _Ticket:
        if self._refusal is not None:
            raise self._refusal
        ticket = _Ticket(lane, nbytes, label, asyncio.get_running_loop().create_future())
        heapq.heappush(self._waiting.setdefault(lane, []), (needed, next(self._order), ticket))
        self._grant()
        if not ticket.granted.done() and (facts := self._stall()) is not None:
            ticket.granted.set_exception(DriveStalled(*facts))
        try:
            await ticket.granted
        except asyncio.CancelledError:
            # Granted and cancelled in the same turn of the loop: without giving the place back it would leak.
            if ticket in self._in_flight:
                self._leave(ticket)
            raise
        return ticket

    def _leave(self, ticket: _Ticket) -> None:
        """Take a request out of flight; a second time does nothing."""
        if ticket not in self._in_flight:
            return
        del self._in_flight[ticket]
        self._num_by_lane[ticket.lane] -= 1
        self._in_flight_nbytes -= ticket.nbytes
        self._grant()
        if not self._in_flight and self._watch is not None:
            self._watch.cancel()
            self._watch = None

    def _grant(self) -> None:
        while (ticket := self._next()) is not None:
            heapq.heappop(self._waiting[ticket.lane])
            self._in_flight[ticket] = None
            self._num_by_lane[ticket.lane] = self._num_by_lane.get(ticket.lane, 0) + 1
            self._in_flight_nbytes += ticket.nbytes
            self._peak_nbytes = max(self._peak_nbytes, self._in_flight_nbytes)
            ticket.since_s = time.monotonic()
            ticket.granted.set_result(None)
            if self._watch is None and self.stall_s is not None:
                self._watch = asyncio.get_running_loop().call_later(self.stall_s, self._look)

    def _next(self) -> _Ticket | None:
        """The request that may start now, if any: the most urgent head of a lane that has a thread free."""
        heads: list[tuple[int, int, _Ticket]] = []
        for lane, heap in self._waiting.items():
            while heap and heap[0][2].granted.done():  # cancelled while it waited
                heapq.heappop(heap)
            if heap and self._num_by_lane.get(lane, 0) < self.lane_depth:
                heads.append(heap[0])
        if not heads:
            return None
        first = min(heads)[2]
        if len(self._in_flight) < self.depth and self._in_flight_nbytes + first.nbytes <= self.max_in_flight_nbytes:
            return first
        # The most urgent request does not fit. A smaller one must not overtake it, else it might starve; only a lane
        # with nothing in flight may, so that reads and writes never wait for each other to end.
        return next((ticket for _, _, ticket in heads if not self._num_by_lane.get(ticket.lane)), None)

    def _oldest(self) -> _Ticket | None:
        return min(list(self._in_flight), key=lambda ticket: ticket.since_s, default=None)

    def _stall(self) -> tuple[str, str, float, int, str] | None:
        """What DriveStalled says to those that wait, if the oldest request has been in flight for `stall_s`."""
        oldest = self._oldest()
        if oldest is None or self.stall_s is None or time.monotonic() - oldest.since_s < self.stall_s:
            return None
        num_waiting = sum(not ticket.granted.done() for heap in self._waiting.values() for _, _, ticket in heap)
        state = f"{len(self._in_flight)} requests with {self._in_flight_nbytes} bytes in flight, {num_waiting} waiting"
        return self.name, oldest.label, time.monotonic() - oldest.since_s, oldest.nbytes, state

    def _look(self) -> None:
        """Fail what waits behind a request that does not end, and look again as long as anything is in flight."""
        assert self.stall_s is not None
        self._watch, delay_s, oldest = None, self.stall_s, self._oldest()
        if (facts := self._stall()) is not None:
            log.error("%s", DriveStalled(*facts))
            self._fail_waiting(lambda: DriveStalled(*facts))
        elif oldest is not None:
            delay_s = oldest.since_s + self.stall_s - time.monotonic()
        if oldest is not None:
            self._watch = asyncio.get_running_loop().call_later(delay_s, self._look)

    def refuse(self, error: Exception) -> None:
        """Fail every queued request, and every later one, with `error`. What is in flight ends by itself."""
        self._refusal = error
        self._fail_waiting(lambda: error)

    def _fail_waiting(self, error: Callable[[], Exception]) -> None:
        waiting, self._waiting = self._waiting, {}
        for heap in waiting.values():
            for _, _, ticket in heap:
                if not ticket.granted.done():
                    ticket.granted.set_exception(error())

    def statistics(self) -> QueueStatistics:
        """May be called from any thread; the figures are of one moment only as far as the GIL makes them so."""
        in_flight, oldest = list(self._in_flight), self._oldest()
        return QueueStatistics(
            name=self.name,
            num_queued=sum(len(heap) for heap in list(self._waiting.values())),
            num_in_flight=len(in_flight),
            in_flight_nbytes=self._in_flight_nbytes,
            peak_in_flight_nbytes=self._peak_nbytes,
            oldest_s=time.monotonic() - oldest.since_s if oldest else 0.0,
            oldest=oldest.label if oldest else "",
        )
