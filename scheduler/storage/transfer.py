"""Whole transfers out of requests that may be short, interrupted or fail once."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable

from .backend import StorageFile
from .errors import OffloadIOError

NUM_RETRIES = 3
RETRY_PAUSE_S = 0.01
_TRANSIENT = (errno.EIO, errno.EAGAIN, errno.ETIMEDOUT)


def read_fully(file: StorageFile, buffer: memoryview, offset: int) -> int:
    """Fill `buffer` from `offset` of `file`. Blocks. Returns how many requests had to be retried.

    A short read is continued where it stopped; EIO and timeouts are retried `NUM_RETRIES` times per transfer.
    Raises: OffloadIOError with path, offset and length of what is missing.
    """
    return _move(file, file.read_into, buffer, offset, "reading")


def write_fully(file: StorageFile, buffer: memoryview, offset: int) -> int:
    """Write all of `buffer` at `offset` of `file`. Blocks. Returns and raises as `read_fully`."""
    return _move(file, file.write_from, buffer, offset, "writing")


def _move(
    file: StorageFile, request: Callable[[memoryview, int], int], buffer: memoryview, offset: int, verb: str
) -> int:
    nbytes, done, num_failures = len(buffer), 0, 0
    while done < nbytes:
        left = nbytes - done
        try:
            moved = request(buffer[done:] if done else buffer, offset + done)
        except InterruptedError:
            continue
        except OSError as error:
            number = error.errno or errno.EIO
            if number in _TRANSIENT and num_failures < NUM_RETRIES:
                num_failures += 1
                time.sleep(RETRY_PAUSE_S * num_failures)
                continue
            what = f"{verb} failed" + (f" after {num_failures} retries" if num_failures else "")
            raise OffloadIOError(file.path, offset + done, left, number, what=what) from error
        if not 0 < moved <= left:
            what = f"{verb} moved {moved} of {left} bytes"
            mend = "the file is shorter than the store made it: verify the store" if verb == "reading" else ""
            raise OffloadIOError(file.path, offset + done, left, errno.EIO, what=what, mend=mend)
        done += moved
    return num_failures


def flush_fully(file: StorageFile) -> None:
    """`file.flush()`, with its failure named. Never retried: after a failed flush the kernel may have dropped the data.

    Raises: OffloadIOError.
    """
    while True:
        try:
            return file.flush()
        except InterruptedError:
            continue
        except OSError as error:
            raise OffloadIOError(file.path, 0, 0, error.errno or errno.EIO, what="flushing failed") from error
