"""A drive of a given speed, simulated over one that is faster: the same rig on every machine."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from .backend import Backend, StorageFile
from .wrapped import WrappedBackend, WrappedFile


@dataclass(frozen=True, kw_only=True)
class Pace:
    """The drive to simulate.

    Attributes:
        read_gb_s, write_gb_s: bandwidth in 1e9 bytes per second.
        latency_s: added to every request, overlapping with others.
        depth: requests that the drive serves at once; more wait.
        duplex: True serves reads and writes side by side at full rate each; False shares one channel between them
            (the additive law of a single consumer drive).
        flush_s: seconds that a flush takes.
        jitter: service times vary by up to this share up and down, reproducibly from `seed`.
    """

    read_gb_s: float
    write_gb_s: float
    latency_s: float = 0.0
    depth: int = 64
    duplex: bool = True
    flush_s: float = 0.0
    jitter: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.read_gb_s, self.write_gb_s) <= 0 or self.depth < 1 or not 0 <= self.jitter < 1:
            raise ValueError(f"bandwidths must be > 0, depth >= 1 and jitter in [0, 1), got {self}")
        if min(self.latency_s, self.flush_s) < 0:
            raise ValueError(f"latency_s and flush_s must be >= 0, got {self}")


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
        self._places = threading.Semaphore(pace.depth)
        self._busy_until_s: dict[str, float] = {}
        self._random = random.Random(pace.seed)

    def open(self, name: str, *, create: bool = False) -> StorageFile:
        return _PacedFile(self.inner.open(name, create=create), self)

    def serve(self, direction: str, work: Callable[[], int], nbytes: int) -> int:
        """Do `work` and return when the simulated drive would have done it."""
        with self._places:
            end_s = self._book(direction, nbytes)
            moved = work()
            rest_s = end_s - self._clock()
            if rest_s > 0:
                self._sleep(rest_s)
            return moved

    def _book(self, direction: str, nbytes: int) -> float:
        """Take the next free stretch of the channel; returns when the request is done."""
        rate = (self.pace.read_gb_s if direction == "read" else self.pace.write_gb_s) * 1e9
        channel = direction if self.pace.duplex else "both"
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
