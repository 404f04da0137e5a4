"""Backends around a backend: every call may be looked at, delayed, recorded or failed."""

from __future__ import annotations

from pathlib import Path

from .backend import Backend, StorageFile


class WrappedFile:
    """Passes every call on; a subclass overrides what it changes."""

    def __init__(self, inner: StorageFile) -> None:
        self.inner = inner
        self.path: Path = inner.path

    def read_into(self, buffer: memoryview, offset: int) -> int:
        return self.inner.read_into(buffer, offset)

    def write_from(self, buffer: memoryview, offset: int) -> int:
        return self.inner.write_from(buffer, offset)

    def flush(self) -> None:
        self.inner.flush()

    def close(self) -> None:
        self.inner.close()


class WrappedBackend:
    """Passes every call on; a subclass overrides what it changes."""

    def __init__(self, inner: Backend) -> None:
        self.inner = inner
        self.root: Path = inner.root
        self.direct: bool = inner.direct
        self.volatile: bool = inner.volatile

    def open(self, name: str, *, create: bool = False) -> StorageFile:
        return WrappedFile(self.inner.open(name, create=create))

    def reserve(self, name: str, nbytes: int) -> None:
        self.inner.reserve(name, nbytes)

    def size_nbytes(self, name: str) -> int | None:
        return self.inner.size_nbytes(name)

    def names(self) -> list[str]:
        return self.inner.names()

    def rename(self, source: str, target: str) -> None:
        self.inner.rename(source, target)

    def remove(self, name: str) -> None:
        self.inner.remove(name)

    def sync_directory(self) -> None:
        self.inner.sync_directory()

    def free_nbytes(self) -> int:
        return self.inner.free_nbytes()
