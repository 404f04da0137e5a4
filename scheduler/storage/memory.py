"""Files in host memory: for tests of what is above a drive, never a place for real runs."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

from .errors import NoSpace


class MemoryFile:
    """One file of a `MemoryBackend`. A read past the end is short, as on a drive."""

    def __init__(self, path: Path, data: bytearray, lock: threading.Lock) -> None:
        self.path = path
        self._data: bytearray | None = data
        self._lock = lock

    def _open(self) -> bytearray:
        if self._data is None:
            raise OSError(errno.EBADF, "file is closed", str(self.path))
        return self._data

    def read_into(self, buffer: memoryview, offset: int) -> int:
        with self._lock:
            part = self._open()[offset : offset + len(buffer)]
        buffer[: len(part)] = part
        return len(part)

    def write_from(self, buffer: memoryview, offset: int) -> int:
        with self._lock:
            data = self._open()
            if len(data) < offset + len(buffer):
                data.extend(bytes(offset + len(buffer) - len(data)))
            data[offset : offset + len(buffer)] = buffer
        return len(buffer)

    def flush(self) -> None:
        self._open()

    def close(self) -> None:
        self._data = None


class MemoryBackend:
    """A directory whose files end with this object.

    Args:
        root: a name for messages; nothing is made there.
        capacity_nbytes: `reserve` raises NoSpace beyond it.
        files: contents to begin with, e.g. what a power cut left.
    """

    direct = False
    volatile = True

    def __init__(self, root: Path, *, capacity_nbytes: int = 1 << 40, files: dict[str, bytes] | None = None) -> None:
        self.root = Path(root)
        self._capacity_nbytes = capacity_nbytes
        self._lock = threading.Lock()
        self._files = {name: bytearray(data) for name, data in (files or {}).items()}

    def open(self, name: str, *, create: bool = False) -> MemoryFile:
        with self._lock:
            if create:
                self._files[name] = bytearray()
            if name not in self._files:
                raise FileNotFoundError(errno.ENOENT, "no such file", str(self.root / name))
            return MemoryFile(self.root / name, self._files[name], self._lock)

    def reserve(self, name: str, nbytes: int) -> None:
        free_nbytes = self.free_nbytes()
        if nbytes > free_nbytes:
            raise NoSpace(self.root / name, nbytes, free_nbytes)
        with self._lock:
            if name in self._files:
                raise FileExistsError(errno.EEXIST, "file exists", str(self.root / name))
            self._files[name] = bytearray(nbytes)

    def size_nbytes(self, name: str) -> int | None:
        with self._lock:
            data = self._files.get(name)
            return None if data is None else len(data)

    def names(self) -> list[str]:
        with self._lock:
            return sorted(self._files)

    def rename(self, source: str, target: str) -> None:
        with self._lock:
            self._files[target] = self._files.pop(source)

    def remove(self, name: str) -> None:
        with self._lock:
            self._files.pop(name, None)

    def sync_directory(self) -> None:
        pass

    def free_nbytes(self) -> int:
        with self._lock:
            return self._capacity_nbytes - sum(map(len, self._files.values()))

    def contents(self) -> dict[str, bytes]:
        """A copy of every file."""
        with self._lock:
            return {name: bytes(data) for name, data in self._files.items()}
