"""Files on a real file system: positional I/O that passes by the page cache where the file system can."""

from __future__ import annotations

import logging
import os
import resource
from pathlib import Path

import numpy as np

from ..hostmem import allocate_pages
from .backend import ALIGN_NBYTES
from .errors import NoSpace, OffloadIOError

log = logging.getLogger(__name__)

_PROBE_NBYTES = 4 * ALIGN_NBYTES


def view_of(buffer: object) -> memoryview:
    """Writable byte view of a uint8 CPU tensor, an array or a bytes-like object, without a copy."""
    numpy = getattr(buffer, "numpy", None)
    return memoryview(numpy() if numpy is not None else buffer).cast("B")  # type: ignore[arg-type]


def address_of(buffer: memoryview) -> int:
    """Memory address of the first byte."""
    return int(np.frombuffer(buffer, dtype=np.uint8).__array_interface__["data"][0])


class PosixFile:
    """One file with a direct descriptor for aligned requests and a buffered one for the rest.

    The kernel keeps both coherent: a direct request first writes back and drops the cached pages of its range.
    """

    def __init__(self, path: Path, *, direct: bool, create: bool = False) -> None:
        self.path = path
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT | os.O_TRUNC if create else 0)
        self._buffered = os.open(path, flags, 0o600)
        self._direct: int | None = None
        if direct:
            try:
                self._direct = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_DIRECT)
            except BaseException:
                os.close(self._buffered)
                raise

    @property
    def direct_descriptor(self) -> int:
        """Descriptor that passes by the page cache, for aligned requests only; -1 if there is none."""
        return -1 if self._direct is None else self._direct

    def _descriptor(self, buffer: memoryview, offset: int) -> int:
        if self._direct is None or offset % ALIGN_NBYTES or len(buffer) % ALIGN_NBYTES or not len(buffer):
            return self._buffered
        return self._buffered if address_of(buffer) % ALIGN_NBYTES else self._direct

    def read_into(self, buffer: memoryview, offset: int) -> int:
        return os.preadv(self._descriptor(buffer, offset), [buffer], offset)

    def write_from(self, buffer: memoryview, offset: int) -> int:
        return os.pwritev(self._descriptor(buffer, offset), [buffer], offset)

    def flush(self) -> None:
        os.fdatasync(self._buffered)

    def close(self) -> None:
        for descriptor in (self._direct, self._buffered):
            if descriptor is not None and descriptor >= 0:
                os.close(descriptor)
        self._direct, self._buffered = None, -1


class PosixBackend:
    """A directory of a mounted file system. The directory must exist."""

    volatile = False

    def __init__(self, root: Path, *, direct: bool) -> None:
        self.root = Path(root)
        self.direct = direct

    def open(self, name: str, *, create: bool = False) -> PosixFile:
        return PosixFile(self.root / name, direct=self.direct, create=create)

    def reserve(self, name: str, nbytes: int) -> None:
        path = self.root / name
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            if nbytes:
                os.posix_fallocate(descriptor, 0, nbytes)
        except OSError as error:
            free_nbytes = self.free_nbytes()
            os.unlink(path)
            if error.errno in (28, 122):  # ENOSPC, EDQUOT
                raise NoSpace(path, nbytes, free_nbytes) from error
            raise OffloadIOError(path, 0, nbytes, error.errno or 0, what="cannot reserve space") from error
        except BaseException:
            os.unlink(path)
            raise
        finally:
            os.close(descriptor)

    def size_nbytes(self, name: str) -> int | None:
        try:
            return os.stat(self.root / name).st_size
        except FileNotFoundError:
            return None

    def names(self) -> list[str]:
        return sorted(os.listdir(self.root))

    def rename(self, source: str, target: str) -> None:
        os.rename(self.root / source, self.root / target)

    def remove(self, name: str) -> None:
        (self.root / name).unlink(missing_ok=True)

    def sync_directory(self) -> None:
        descriptor = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def free_nbytes(self) -> int:
        facts = os.statvfs(self.root)
        return facts.f_bavail * facts.f_frsize


def prove(backend: PosixBackend) -> None:
    """Write, read back and compare a few pages through `backend`.

    Raises: OSError if the file system refuses; ValueError if other bytes come back than were written.
    """
    name = f".probe-{os.getpid()}"
    source, target = allocate_pages(_PROBE_NBYTES), allocate_pages(_PROBE_NBYTES)
    wanted = view_of(source)
    wanted[:] = os.urandom(_PROBE_NBYTES)
    try:
        file = backend.open(name, create=True)
        try:
            for offset in (0, _PROBE_NBYTES):
                moved = file.write_from(wanted, offset)
                got = file.read_into(view_of(target), offset)
                if moved != _PROBE_NBYTES or got != _PROBE_NBYTES or view_of(target) != wanted:
                    raise ValueError(
                        f"{backend.root} gave back other bytes than were written ({moved} written, {got} read of "
                        f"{_PROBE_NBYTES}); this file system cannot hold a store, name another directory"
                    )
        finally:
            file.close()
    finally:
        backend.remove(name)


def open_backend(root: Path) -> PosixBackend:
    """The fastest backend that proves itself in `root`: direct I/O, else buffered with one logged warning.

    Raises: OSError or ValueError if not even buffered I/O gives back what was written.
    """
    if hasattr(os, "O_DIRECT"):
        direct = PosixBackend(root, direct=True)
        try:
            prove(direct)
            return direct
        except (OSError, ValueError) as error:
            reason = str(error)
    else:
        reason = "this system has no O_DIRECT"
    buffered = PosixBackend(root, direct=False)
    prove(buffered)
    log.warning(
        "%s: direct I/O does not work here (%s); using the page cache, which costs a copy and host memory. "
        "Name a directory on a local ext4 or xfs file system for full speed.",
        root,
        reason,
    )
    return buffered


def ensure_descriptors(num_files: int) -> None:
    """Raise this process's soft limit of open files so that `num_files` more can be opened (two descriptors each).

    Raises: ValueError if the hard limit forbids it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * num_files + 512
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ValueError(
            f"the store needs {needed} open files, the hard limit is {hard}; raise it (`ulimit -Hn`, limits.conf) "
            f"or use fewer, larger units"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
