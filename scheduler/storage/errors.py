"""What goes wrong between a program and a drive, with everything a user needs to act on it."""

from __future__ import annotations

import errno
from pathlib import Path

_MENDS = {
    errno.EIO: "the drive or its cable is failing: look at the kernel log, copy what matters, use another drive",
    errno.ENOSPC: "free space on this drive, or name a directory on a larger one",
    errno.EDQUOT: "ask for a larger quota, or name a directory on another drive",
    errno.EROFS: "the file system is mounted read-only (often after an error): look at the kernel log, then remount it",
    errno.EACCES: "give this user write permission, or name another directory",
    errno.EPERM: "give this user write permission, or name another directory",
    errno.EMFILE: "raise the limit of open files (`ulimit -n`)",
    errno.ENODEV: "the drive has disappeared: look at the kernel log",
    errno.EINVAL: "the file system refused the request's alignment: use the buffered backend",
}
_STALLED_MEND = (
    "Look at the kernel log for this drive; if it is only slow, give the store a larger stall_s, or None to wait"
)


class OffloadIOError(OSError):
    """One transfer failed for good.

    Attributes:
        path: file that was read or written.
        offset: byte offset in that file where the failed request began.
        nbytes: bytes that were still to be moved from there.
        errno: the operating system's error number (EIO for a transfer that ended early).
        mend: what the user can do about it.
    """

    def __init__(self, path: Path | str, offset: int, nbytes: int, number: int, *, what: str, mend: str = "") -> None:
        self.path = Path(path)
        self.offset = offset
        self.nbytes = nbytes
        self.mend = mend or _MENDS.get(number, "look at the kernel log for this drive")
        name = errno.errorcode.get(number, str(number))
        text = f"{what}: {name} at bytes {offset}..{offset + nbytes} of {path}; {self.mend}"
        super().__init__(number, text, str(path))

    def __str__(self) -> str:
        return str(self.strerror)


class NoSpace(OffloadIOError):
    """The drive has less free space than the files need. Nothing that was begun has been left behind.

    Attributes: needed_nbytes, free_nbytes.
    """

    def __init__(self, path: Path | str, needed_nbytes: int, free_nbytes: int) -> None:
        self.needed_nbytes = needed_nbytes
        self.free_nbytes = free_nbytes
        super().__init__(
            path,
            0,
            needed_nbytes,
            errno.ENOSPC,
            what=f"cannot reserve {needed_nbytes} bytes, {free_nbytes} bytes are free",
            mend=f"free {max(0, needed_nbytes - free_nbytes)} bytes more, or name a directory on a larger drive",
        )


class DriveStalled(OffloadIOError):
    """A drive has not answered a request for so long that what waits behind it gives up.

    Attributes: oldest (the request), age_s (how long the drive has had it). Its own buffer stays the drive's.
    """

    def __init__(self, path: Path | str, oldest: str, age_s: float, nbytes: int, state: str) -> None:
        self.oldest = oldest
        self.age_s = age_s
        super().__init__(path, 0, nbytes, errno.ETIMEDOUT, what="the drive does not answer", mend=_STALLED_MEND)
        self.strerror = (
            f"{path} has not answered for {age_s:.1f} s ({oldest}, {nbytes} bytes); {state}. {_STALLED_MEND}"
        )
