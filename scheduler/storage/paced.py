"""A drive of a given speed, simulated over one that is faster: the same rig on every machine."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from ..rig import LAWS
from .backend import Backend, StorageFile
from .wrapped import WrappedBackend, WrappedFile


@dataclass(frozen=True, kw_only=True)
class Pace:
    """The drive to simulate.

    Attributes:
        read_gb_s, write_gb_s: bandwidth in 1e9 bytes per second.
        latency_s: added to every request, overlapping with others.
        depth: requests that a channel serves at once; more wait.
        law: "duplex" has a channel for reads and one for writes, each at its full rate; "additive" one channel for both
            (a single consumer drive); "mixed" one channel that moves all bytes at `mixed_gb_s`. As `rig.DriveSpeed`.
        mixed_gb_s: for the law "mixed", and only there.
        flush_s: seconds that a flush takes.
        jitter: service times vary by up to this share up and down, reproducibly from `seed`.
    """

    read_gb_s: float
    write_gb_s: float
    latency_s: float = 0.0
    depth: int = 64
    law: str = "duplex"
    mixed_gb_s: float | None = None
    flush_s: float = 0.0
    jitter: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.law not in LAWS or (self.law == "mixed") != (self.mixed_gb_s is not None):
            raise ValueError(f"law must be one of {', '.join(LAWS)}, and mixed_gb_s goes with mixed only, got {self}")
        if (
            min(self.read_gb_s, self.write_gb_s, 1 if self.mixed_gb_s is None else self.mixed_gb_s) <= 0
            or self.depth < 1
            or not 0 <= self.jitter < 1
        ):
            raise ValueError(f"bandwidths must be > 0, depth >= 1 and jitter in [0, 1), got {self}")
        if min(self.latency_s, self.flush_s) < 0:
            raise ValueError(f"latency_s and flush_s must be >= 0, got {self}")

    def channel(self, direction: str) -> tuple[str, float]:
        """The channel that "read" or "write" goes through, and its bytes per second."""
        alone_gb_s = self.read_gb_s if direction == "read" else self.write_gb_s
        name = direction if self.law == "duplex" else "both"
        return name, (self.mixed_gb_s or alone_gb_s) * 1e9


class PacedBackend(WrappedBackend):
    """`inner` slowed down to `pace`. All files share the one simulated drive.

    The bytes really move through `inner`; if that is slower than the pace, its own speed shows.
    """

    def __init__(
        self, inner: Backend, pace: Pace, *, clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:  # fmt: skip
        super().__init__(inner)
        self.pace = pace
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        self._places = {name: threading.Semaphore(pace.depth) for name in ("read", "write", "both")}
        self._busy_until_s: dict[str, float] = {}
        self._random = random.Random(pace.seed)

    def open(self, name: str, *, create: bool = False) -> StorageFile:
        return _PacedFile(self.inner.open(name, create=create), self)

    def serve(self, direction: str, work: Callable[[], int], nbytes: int) -> int:
        """Do `work` and return when the simulated drive would have done it."""
        channel, _ = self.pace.channel(direction)
        with self._places[channel]:
            end_s = self._book(direction, nbytes)
            moved = work()
            rest_s = end_s - self._clock()
            if rest_s > 0:
                self._sleep(rest_s)
            return moved

    def _book(self, direction: str, nbytes: int) -> float:
        """Take the next free stretch of the channel; returns when the request is done."""
        channel, rate = self.pace.channel(direction)
        with self._lock:
            stretch = 1 + self.pace.jitter * self._random.uniform(-1, 1)
            start_s = max(self._clock(), self._busy_until_s.get(channel, 0.0))
            self._busy_until_s[channel] = start_s + nbytes / rate * stretch
            return self._busy_until_s[channel] + self.pace.latency_s * stretch


class _PacedFile(WrappedFile):
    def __init__(self, inner: StorageFile, backend: PacedBackend) -> None:
        super().__init__(inner)
        self._backend = backend

    def read_into(self, buffer: memoryview, offset: int) -> int:
        return self._backend.serve("read", lambda: self.inner.read_into(buffer, offset), len(buffer))

    def write_from(self, buffer: memoryview, offset: int) -> int:
        return self._backend.serve("write", lambda: self.inner.write_from(buffer, offset), len(buffer))

    def flush(self) -> None:
        self.inner.flush()
        if self._backend.pace.flush_s:
            self._backend._sleep(self._backend.pace.flush_s)
