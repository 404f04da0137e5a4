"""Bookkeeping of one pass after another: which calls wait for backward, what they keep, how long compute took."""

from __future__ import annotations

import threading

from .scheduler.devices import Event
from .scheduler.trace import Span, Trace
from .units import CallSite


class CallLedger:
    """Counts calls whose backward is still to come, and the bytes that lie outside of every budget.

    Touched by the training thread, autograd's threads and the garbage collector (which may run inside any of them, so
    the lock is re-entrant).
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._pending: dict[tuple[int, int], int] = {}
        self._boundary_nbytes = 0
        self.boundaries_peak_nbytes = 0
        self.temporaries_nbytes = 0

    def made(self, site: CallSite, micro_batch: int = 0) -> None:
        for unit in site.units:
            self.owe(unit.index, micro_batch, 1)

    def done(self, site: CallSite, micro_batch: int = 0) -> None:
        for unit in site.units:
            self.owe(unit.index, micro_batch, -1)

    def owe(self, unit: int, micro_batch: int, by: int) -> None:
        """Backward owes `unit` so many more (or, negative, fewer) contributions of `micro_batch`."""
        with self._lock:
            self._pending[unit, micro_batch] = self._pending.get((unit, micro_batch), 0) + by

    def pending(self, unit: int, micro_batch: int = 0) -> bool:
        """Whether some call of the unit by the micro-batch still waits for its backward."""
        return self._pending.get((unit, micro_batch), 0) > 0

    def boundary_held(self, nbytes: int) -> None:
        with self._lock:
            self._boundary_nbytes += nbytes
            self.boundaries_peak_nbytes = max(self.boundaries_peak_nbytes, self._boundary_nbytes)

    def temporaries_seen(self, nbytes: int) -> None:
        self.temporaries_nbytes = max(self.temporaries_nbytes, nbytes)


class ComputeRecord:
    """Compute events of a step, turned into spans once they have passed."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._pairs: list[tuple[str, str, Event, Event]] = []

    def add(self, site: CallSite, phase: str, begin: Event, end: Event) -> None:
        """A call of `site` in `phase`: "forward" or "backward" (recomputation included)."""
        self._pairs.append((site.name, phase, begin, end))

    def forget(self) -> None:
        """Drop what was recorded since the last step."""
        self._pairs = []

    def settle(self) -> None:
        """Write the spans of all pairs. Blocks until the last event has passed."""
        pairs, self._pairs = self._pairs, []
        for name, phase, begin, end in pairs:
            start_s = begin.time_s()
            self._trace.add(Span("compute", start_s, end.time_s(), name, phase, 0, start_s))
