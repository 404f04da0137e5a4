"""The small interface between the store and whatever holds its bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

ALIGN_NBYTES = 4096


class StorageFile(Protocol):
    """One open file. All calls block; they may come from several threads at once on ranges that do not overlap."""

    path: Path

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Read up to `len(buffer)` bytes at `offset`; returns how many came, 0 at the end of the file."""

    def write_from(self, buffer: memoryview, offset: int) -> int:
        """Write up to `len(buffer)` bytes at `offset`; returns how many were taken."""

    def flush(self) -> None:
        """Return once everything written to this file before the call would survive a power cut."""

    def close(self) -> None:
        """Give the descriptor back. No transfer may be under way."""


class Backend(Protocol):
    """One directory of one drive, flat: names have no separators.

    `direct` tells whether transfers pass by the page cache, `volatile` whether the bytes end with the process.
    """

    root: Path
    direct: bool
    volatile: bool

    def open(self, name: str, *, create: bool = False) -> StorageFile:
        """Open an existing file, or with `create` an empty new one (an old one of that name is emptied), mode 0600."""

    def reserve(self, name: str, nbytes: int) -> None:
        """Create `name` with `nbytes` of allocated space. On failure no such file is left."""

    def size_nbytes(self, name: str) -> int | None:
        """Length of the file, None if there is none."""

    def names(self) -> list[str]:
        """All file names in the directory, sorted."""

    def rename(self, source: str, target: str) -> None:
        """Atomically give `source` the name `target`; durable after `sync_directory`."""

    def remove(self, name: str) -> None:
        """Remove a file; no error if it is missing."""

    def sync_directory(self) -> None:
        """Make creations, renames and removals in the directory durable."""

    def free_nbytes(self) -> int:
        """Bytes that this user can still allocate here."""
