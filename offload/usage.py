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
        self._pending: dict[int, int] = {}
        self._boundary_nbytes = 0
        self.boundaries_peak_nbytes = 0
        self.temporaries_nbytes = 0

    def made(self, site: CallSite) -> None:
        self._add(site, 1)

    def done(self, site: CallSite) -> None:
        self._add(site, -1)

    def _add(self, site: CallSite, by: int) -> None:
        with self._lock:
            for unit in site.units:
                self._pending[unit.index] = self._pending.get(unit.index, 0) + by

    def pending(self, unit: int) -> bool:
        """Whether some call of the unit still waits for its backward."""
        return self._pending.get(unit, 0) > 0

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
        self._pairs: list[tuple[str, Event, Event]] = []

    def add(self, site: CallSite, begin: Event, end: Event) -> None:
        self._pairs.append((site.name, begin, end))

    def forget(self) -> None:
        """Drop what was recorded since the last step."""
        self._pairs = []

    def settle(self) -> None:
        """Write the spans of all pairs. Blocks until the last event has passed."""
        pairs, self._pairs = self._pairs, []
        for name, begin, end in pairs:
            start_s = begin.time_s()
            self._trace.add(Span("compute", start_s, end.time_s(), name, "call", 0, start_s))
