"""The record of what every lane did: one span per operation, from which every figure is derived."""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass

LANES = ("compute", "h2d", "d2h", "read", "write", "cpu")


@dataclass(frozen=True, slots=True)
class Span:
    """One operation on one lane. Times are `time.perf_counter()` seconds.

    `queued_s` is when the operation was asked for; it served from `start_s` to `end_s`.
    """

    lane: str
    start_s: float
    end_s: float
    unit: str
    kind: str
    nbytes: int
    queued_s: float


@dataclass(frozen=True, slots=True)
class Wait:
    """An interval in which the training thread stood still for `unit` (compute was exposed)."""

    start_s: float
    end_s: float
    unit: str


class Trace:
    """Thread-safe collector of spans and waits; `drain()` hands over what came since the last drain."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spans: list[Span] = []
        self._waits: list[Wait] = []

    def add(self, span: Span) -> None:
        with self._lock:
            self._spans.append(span)

    def add_wait(self, wait: Wait) -> None:
        with self._lock:
            self._waits.append(wait)

    def forget_fetches(self) -> None:
        """Drop the fetches of parameters and the waits for them; what else was moved stays on record."""
        with self._lock:
            self._spans = [span for span in self._spans if span.kind != "param"]
            self._waits = []

    def drain(self, until_s: float = float("inf")) -> tuple[list[Span], list[Wait]]:
        """Return all spans and waits recorded since the last call and forget them; spans that started at `until_s` or
        later are left for the next call."""
        with self._lock:
            spans = [span for span in self._spans if span.start_s < until_s]
            self._spans = [span for span in self._spans if span.start_s >= until_s]
            waits, self._waits = self._waits, []
        return spans, waits


def union_s(intervals: Iterable[tuple[float, float]]) -> float:
    """Total length in seconds of the union of (start, end) intervals."""
    total, reach = 0.0, float("-inf")
    for start, end in sorted(intervals):
        if end > reach:
            total += end - max(start, reach)
            reach = end
    return total


def busy_s(spans: Iterable[Span]) -> dict[str, float]:
    """Seconds in which each lane had at least one operation in service."""
    by_lane: dict[str, list[tuple[float, float]]] = {lane: [] for lane in LANES}
    for span in spans:
        by_lane[span.lane].append((span.start_s, span.end_s))
    return {lane: union_s(intervals) for lane, intervals in by_lane.items()}


def moved_nbytes(spans: Iterable[Span]) -> dict[str, int]:
    """Bytes that each lane moved."""
    total = dict.fromkeys(LANES, 0)
    for span in spans:
        total[span.lane] += span.nbytes
    return total


def exposed_s(spans: Iterable[Span], waits: Iterable[Wait]) -> dict[str, float]:
    """Share out the seconds that compute waited over the lanes it waited for.

    A wait for unit u is charged to the operations of u that were queued or in service during it, earliest
    first, so that no second is charged twice. What no operation of u covers is charged to whichever operation
    was in service then (u stood behind it), and what is left, to `cpu` (the host's own bookkeeping).
    """
    ordered = sorted((span for span in spans if span.lane != "compute"), key=lambda span: span.start_s)
    of_unit: dict[str, list[Span]] = {}
    for span in ordered:
        of_unit.setdefault(span.unit, []).append(span)
    starts = [span.start_s for span in ordered]
    longest_s = max((span.end_s - span.start_s for span in ordered), default=0.0)
    total = dict.fromkeys(LANES, 0.0)
    for wait in waits:
        near = ordered[bisect_left(starts, wait.start_s - longest_s) : bisect_right(starts, wait.end_s)]
        intervals = [(span.lane, span.queued_s, span.end_s) for span in of_unit.get(wait.unit, ())]
        intervals += [(span.lane, span.start_s, span.end_s) for span in near if span.unit != wait.unit]
        gaps = [(wait.start_s, wait.end_s)]
        for lane, start, end in intervals:
            gaps = _charge(total, lane, start, end, gaps)
            if not gaps:
                break
        total["cpu"] += sum(end - start for start, end in gaps)
    return total


def _charge(
    total: dict[str, float], lane: str, start: float, end: float, gaps: list[tuple[float, float]]
) -> list[tuple[float, float]]:
    """Charge `lane` with the part of `gaps` inside (start, end); return the gaps that remain."""
    rest = []
    for gap_start, gap_end in gaps:
        low, high = max(start, gap_start), min(end, gap_end)
        if low >= high:
            rest.append((gap_start, gap_end))
            continue
        total[lane] += high - low
        rest += [piece for piece in ((gap_start, low), (high, gap_end)) if piece[0] < piece[1]]
    return rest
