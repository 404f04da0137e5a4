"""One engine per directory: an advisory lock that dies with its process."""

from __future__ import annotations

import fcntl
import os
import weakref
from pathlib import Path

from .errors import StoreBusy

LOCK_NAME = "lock"
_held: weakref.WeakSet[DirectoryLock] = weakref.WeakSet()


class DirectoryLock:
    """Holds `root/lock` until `release` or the end of the process, however that comes.

    Raises: StoreBusy with the holder's pid if another process, or another store of this one, holds it.
    """

    def __init__(self, root: Path) -> None:
        self.path = root / LOCK_NAME
        self._descriptor: int | None = self._acquire()
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)
        _held.add(self)

    def _acquire(self) -> int:
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Another process may have removed the file between open and flock; a lock on a file without
                # a name excludes nobody.
                if os.fstat(descriptor).st_ino == self._inode():
                    return descriptor
            except BlockingIOError:
                holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
                os.close(descriptor)
                raise StoreBusy(
                    f"{self.path.parent} is in use by the process with pid {holder}; a store belongs to one engine at "
                    f"a time. Close that engine (or end that process), or give this one another directory"
                ) from None
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def _inode(self) -> int | None:
        try:
            return os.stat(self.path).st_ino
        except FileNotFoundError:
            return None

    def release(self, *, remove: bool = False) -> None:
        """Give the lock back; with `remove` the lock file goes too. Safe to call twice."""
        descriptor, self._descriptor = self._descriptor, None
        _held.discard(self)
        if descriptor is not None:
            if remove:
                self.path.unlink(missing_ok=True)
            # Unlocked by word and not only by closing: a child that was forked a moment ago shares the open file.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def _forget_in_child(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _drop_after_fork() -> None:
    # A forked child (a data loader's worker) shares the open file and with it the lock: without this a worker
    # that outlives a killed engine would keep the directory locked.
    for lock in list(_held):
        lock._forget_in_child()
    _held.clear()


os.register_at_fork(after_in_child=_drop_after_fork)
