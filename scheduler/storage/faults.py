"""A drive that fails on order: errors, short transfers, stalls and lies, for tests of everything above it."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from .backend import Backend, StorageFile
from .wrapped import WrappedBackend, WrappedFile

OPERATIONS = ("read", "write", "flush", "open", "reserve", "rename", "sync_directory")


@dataclass(kw_only=True)
class Fault:
    """What goes wrong, and when.

    Attributes:
        operation: one of `OPERATIONS`.
        number: errno to raise; None raises nothing.
        interrupt: raise InterruptedError (EINTR) instead.
        at_most_nbytes: move no more than so many bytes (a short transfer).
        stall: an event that the request waits for before it goes on.
        flip: change one bit of what a read returns.
        name: only files whose name contains it.
        skip: so many matching requests pass first.
        times: so many requests are hit, None for all.
        hits: how many were (filled in).
    """

    operation: str
    number: int | None = None
    interrupt: bool = False
    at_most_nbytes: int | None = None
    stall: threading.Event | None = None
    flip: bool = False
    name: str = ""
    skip: int = 0
    times: int | None = 1
    hits: int = 0
    reached: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        if self.operation not in OPERATIONS:
            raise ValueError(f"operation {self.operation!r} is not one of {', '.join(OPERATIONS)}")


class FaultyBackend(WrappedBackend):
    """`inner` with `faults`; faults may be added and removed while it is in use."""

    def __init__(self, inner: Backend, faults: Sequence[Fault] = ()) -> None:
        super().__init__(inner)
        self.faults = list(faults)
        self._lock = threading.Lock()

    def strike(self, operation: str, name: str) -> list[Fault]:
        """The faults that hit this request, after their stalls; raises what they raise."""
        hit = []
        with self._lock:
            for fault in self.faults:
                if fault.operation != operation or fault.name not in name:
                    continue
                if fault.skip > 0:
                    fault.skip -= 1
                elif fault.times is None or fault.hits < fault.times:
                    fault.hits += 1
                    hit.append(fault)
        for fault in hit:
            fault.reached.set()
            if fault.stall is not None:
                fault.stall.wait()
            if fault.interrupt:
                raise InterruptedError(4, "interrupted", name)
            if fault.number is not None:
                raise OSError(fault.number, os.strerror(fault.number), str(self.root / name))
        return hit

    def open(self, name: str, *, create: bool = False) -> StorageFile:
        self.strike("open", name)
        return _FaultyFile(self.inner.open(name, create=create), self)

    def reserve(self, name: str, nbytes: int) -> None:
        self.strike("reserve", name)
        super().reserve(name, nbytes)

    def rename(self, source: str, target: str) -> None:
        self.strike("rename", target)
        super().rename(source, target)

    def sync_directory(self) -> None:
        self.strike("sync_directory", self.root.name)
        super().sync_directory()


class _FaultyFile(WrappedFile):
    def __init__(self, inner: StorageFile, backend: FaultyBackend) -> None:
        super().__init__(inner)
        self._backend = backend

    def read_into(self, buffer: memoryview, offset: int) -> int:
        hit = self._backend.strike("read", self.path.name)
        moved = super().read_into(_shortened(buffer, hit), offset)
        if moved and any(fault.flip for fault in hit):
            buffer[moved // 2] ^= 1
        return moved

    def write_from(self, buffer: memoryview, offset: int) -> int:
        hit = self._backend.strike("write", self.path.name)
        return super().write_from(_shortened(buffer, hit), offset)

    def flush(self) -> None:
        self._backend.strike("flush", self.path.name)
        super().flush()


def _shortened(buffer: memoryview, hit: list[Fault]) -> memoryview:
    limits = [fault.at_most_nbytes for fault in hit if fault.at_most_nbytes is not None]
    return buffer[: min(limits)] if limits else buffer
