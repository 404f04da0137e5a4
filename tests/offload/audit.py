"""Every operation on a buffer, on record: which bytes, read or written, from when to when; and every lease's life.

`Audit.check` finds, after the fact, two operations on the same bytes at the same time of which one writes, operations
on a pool's bytes that nobody had leased, and pools beyond their budget.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from offload.layout import ChunkArrays
from offload.residency import Residency
from offload.scheduler.fence import Fence
from offload.scheduler.lanes import Lane
from offload.scheduler.pool import Lease, Pool
from offload.staged import Staged


@dataclass(frozen=True)
class Access:
    """One use of the bytes [first, last)."""

    what: str
    first: int
    last: int
    writes: bool
    start_s: float
    end_s: float


@dataclass
class Life:
    """One lease of the bytes [first, last)."""

    pool: str
    holder: str
    first: int
    last: int
    start_s: float
    end_s: float = float("inf")


def ranges(value: Any) -> Iterator[tuple[int, int]]:
    """(first, last) address of everything in an argument that is a buffer."""
    if isinstance(value, Tensor):
        if value.numel() and value.device.type == "cpu":
            yield value.data_ptr(), value.data_ptr() + value.nbytes
    elif isinstance(value, memoryview):
        array = np.frombuffer(value, dtype=np.uint8)
        yield array.ctypes.data, array.ctypes.data + array.nbytes
    elif isinstance(value, ChunkArrays):
        for array in (value.param, value.record, value.grad):
            yield from ranges(array)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from ranges(one)


class Audit:
    """Watches all lanes, pools and holds of the process while it is installed."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.accesses: list[Access] = []
        self.lives: dict[int, Life] = {}
        self.ended: list[Life] = []
        self.problems: list[str] = []
        self._lock = threading.Lock()
        self._holds: dict[tuple[int, int], list[float]] = {}
        self._watch_lanes(patch)
        self._watch_leases(patch)
        self._watch_compute(patch)

    def _watch_lanes(self, patch: pytest.MonkeyPatch) -> None:
        timed = Lane._timed

        def watched(lane: Lane, queued_s: float, unit: str, kind: str, nbytes: int, work: Any, args: Any) -> Any:
            start_s = time.perf_counter()
            try:
                return timed(lane, queued_s, unit, kind, nbytes, work, args)
            finally:
                self._note(lane.name, kind, f"{lane.name} {unit} {kind}", args, start_s, time.perf_counter())

        patch.setattr(Lane, "_timed", watched)

    def _note(self, lane: str, kind: str, what: str, args: Any, start_s: float, end_s: float) -> None:
        if lane in ("h2d", "d2h"):
            destination, source = args[0], args[1]
            self._add(what, ranges(destination), True, start_s, end_s)
            self._add(what, ranges(source), False, start_s, end_s)
        elif lane == "cpu" and kind == "grad" and len(args) > 2:
            _, total, contributions, _ = args
            self._add(what, ranges(total), True, start_s, end_s)
            self._add(what, ranges(contributions), False, start_s, end_s)
        elif lane in ("cpu", "compute") and kind == "update":
            arrays = args[-1]
            self._add(what, ranges([arrays.param, arrays.low, *arrays.states.values()]), True, start_s, end_s)
            self._add(what, ranges(arrays.grad), False, start_s, end_s)
        else:
            self._add(what, ranges(args), lane == "read", start_s, end_s)

    def _add(self, what: str, found: Iterable[tuple[int, int]], writes: bool, start_s: float, end_s: float) -> None:
        with self._lock:
            self.accesses += [Access(what, first, last, writes, start_s, end_s) for first, last in found]

    def _watch_leases(self, patch: pytest.MonkeyPatch) -> None:
        init, release, acquire = Lease.__init__, Lease.release, Pool.try_acquire

        def born(lease: Lease, pool: Pool, buffer: Tensor, holder: str, fence: Fence | None = None) -> None:
            init(lease, pool, buffer, holder, fence)
            first = buffer.data_ptr()
            with self._lock:
                self.lives[id(lease)] = Life(pool.name, holder, first, first + buffer.numel(), time.perf_counter())

        def died(lease: Lease, after: Fence | None = None) -> None:
            with self._lock:
                life = self.lives.pop(id(lease), None)
                if life is not None:
                    life.end_s = time.perf_counter()
                    self.ended.append(life)
            release(lease, after)

        def counted(pool: Pool, nbytes: int, holder: str) -> Lease | None:
            lease = acquire(pool, nbytes, holder)
            now = pool.statistics()
            if now.leased_nbytes + now.warm_nbytes > now.capacity_nbytes:
                self.problems.append(f"{pool.name}: {now.leased_nbytes} + {now.warm_nbytes} of {now.capacity_nbytes}")
            return lease

        patch.setattr(Lease, "__init__", born)
        patch.setattr(Lease, "release", died)
        patch.setattr(Pool, "try_acquire", counted)

    def _watch_compute(self, patch: pytest.MonkeyPatch) -> None:
        acquire, release = Residency.acquire, Residency.release

        def held(residency: Residency, units: Any) -> list[Staged]:
            staged = acquire(residency, units)
            with self._lock:
                for unit, one in zip(units, staged, strict=True):
                    key = (id(residency), unit.index)
                    self._holds.setdefault(key, []).append(time.perf_counter())
                    self._buffers[key] = next(ranges(one.buffer), (0, 0))
            return staged

        def let_go(residency: Residency, units: Any) -> None:
            with self._lock:
                for unit in units:
                    key = (id(residency), unit.index)
                    start_s = self._holds[key].pop()
                    first, last = self._buffers[key]
                    self.accesses.append(
                        Access(f"compute {unit.name}", first, last, False, start_s, time.perf_counter())
                    )
            release(residency, units)

        self._buffers: dict[tuple[int, int], tuple[int, int]] = {}
        patch.setattr(Residency, "acquire", held)
        patch.setattr(Residency, "release", let_go)

    def check(self) -> list[str]:
        """What was wrong, in words; empty if nothing was."""
        return [*self.problems, *self._races(), *self._homeless()]

    def _races(self) -> Iterator[str]:
        active: list[Access] = []
        for access in sorted(self.accesses, key=lambda one: one.start_s):
            active = [other for other in active if other.end_s > access.start_s]
            for other in active:
                overlaps = other.first < access.last and access.first < other.last
                if overlaps and (other.writes or access.writes):
                    yield f"{other.what} and {access.what} at once"
            active.append(access)

    def _homeless(self) -> Iterator[str]:
        """Uses of bytes of a pool outside of the life of their lease. Bytes that were never leased are not a pool's."""
        lives = [*self.ended, *self.lives.values()]
        for access in self.accesses:
            mine = [life for life in lives if life.first < access.last and access.first < life.last]
            if mine and not any(life.start_s <= access.start_s and access.end_s <= life.end_s for life in mine):
                yield f"{access.what} used bytes whose lease had ended ({mine[0].holder})"
