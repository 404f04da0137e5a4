"""Many small reads in one call: the kernel's own asynchronous I/O, used through bare system calls.

A thread per read cannot keep a drive busy with 4 KiB requests: waking a thread costs more than the read. Here one
thread hands the kernel `DEPTH` requests at a time and collects whole handfuls of answers.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import threading
from collections.abc import Sequence

import numpy as np

from .backend import StorageFile
from .files import PosixFile, address_of
from .transfer import read_fully

DEPTH = 64
_CALLS = {"x86_64": (206, 207, 208, 209), "aarch64": (0, 1, 4, 2)}  # io_setup, io_destroy, io_getevents, io_submit
_OPCODE_READ = 0
_REQUEST = np.dtype(
    [("data", "u8"), ("key", "u4"), ("flags", "u4"), ("opcode", "u2"), ("priority", "i2"), ("descriptor", "u4"),
     ("address", "u8"), ("nbytes", "u8"), ("offset", "i8"), ("reserved", "u8"), ("more", "u4"), ("event", "u4")]
)  # fmt: skip
_ANSWER = np.dtype([("data", "u8"), ("request", "u8"), ("moved", "i8"), ("moved2", "i8")])


def read_batch(files: Sequence[StorageFile], views: Sequence[memoryview], offsets: Sequence[int]) -> int:
    """Fill every view from its file and offset. Blocks. Returns how many requests had to be retried.

    Requests of files with direct I/O go to the kernel together; all others, and every request that came back short
    or failed, go through `read_fully`, so retries and errors are the same. Raises: OffloadIOError.
    """
    left = range(len(files))
    descriptors = [
        file._descriptor(view, offset) if isinstance(file, PosixFile) else -1
        for file, view, offset in zip(files, views, offsets, strict=True)
    ]
    direct = [i for i in left if descriptors[i] >= 0 and descriptors[i] == files[i]._direct]  # type: ignore[attr-defined]
    done: set[int] = set()
    if len(direct) > 1 and platform.machine() in _CALLS:
        done = _read_together(direct, descriptors, views, offsets)
    return sum(read_fully(files[i], views[i], offsets[i]) for i in left if i not in done)


def _read_together(
    chosen: Sequence[int], descriptors: Sequence[int], views: Sequence[memoryview], offsets: Sequence[int]
) -> set[int]:
    """Read what the kernel reads in full; returns the indices of those requests. Never raises for a failed read.

    Invariant: when this returns, no request is in flight; the kernel would go on writing into the buffers.
    """
    context = _context()
    if context is None:
        return set()  # the system's limit of asynchronous requests is used up: the plain way does it all
    requests = np.zeros(len(chosen), dtype=_REQUEST)
    requests["data"] = np.arange(len(chosen))
    requests["opcode"] = _OPCODE_READ
    requests["descriptor"] = [descriptors[i] for i in chosen]
    requests["address"] = [address_of(views[i]) for i in chosen]
    requests["nbytes"] = [len(views[i]) for i in chosen]
    requests["offset"] = [offsets[i] for i in chosen]
    pointers = np.arange(len(chosen), dtype=np.uint64) * _REQUEST.itemsize + np.uint64(requests.ctypes.data)
    answers = np.zeros(DEPTH, dtype=_ANSWER)
    moved = np.full(len(chosen), -1, dtype=np.int64)
    sent, got, refused = 0, 0, False
    while got < sent or (sent < len(chosen) and not refused):
        room = min(DEPTH - (sent - got), len(chosen) - sent)
        if room and not refused:
            taken = context.submit(room, pointers.ctypes.data + 8 * sent)
            refused = taken <= 0
            sent += max(0, taken)
        if sent > got:
            num = context.collect(max(1, (sent - got) // 4), answers.ctypes.data)
            if num < 0:
                context.close()  # returns only when nothing is in flight any more
                _thread.pid = None
                break
            moved[answers["data"][:num].astype(np.int64)] = answers["moved"][:num]
            got += num
    return {chosen[int(i)] for i in np.flatnonzero(moved == requests["nbytes"].astype(np.int64))}


class _Context:
    """The kernel's queue of one thread. Kept, because ending one takes the kernel tens of milliseconds."""

    def __init__(self) -> None:
        self._setup, self._destroy, self._getevents, self._submit = _CALLS[platform.machine()]
        self._call = ctypes.CDLL(None, use_errno=True).syscall
        self._call.restype = ctypes.c_long
        self._handle = ctypes.c_ulong(0)
        if self._call(ctypes.c_long(self._setup), ctypes.c_long(DEPTH), ctypes.byref(self._handle)) != 0:
            raise OSError(ctypes.get_errno(), "io_setup")

    def submit(self, num: int, pointers: int) -> int:
        """Hand over `num` requests; returns how many were taken, at most 0 if the kernel refuses."""
        return int(self._call(ctypes.c_long(self._submit), self._handle, ctypes.c_long(num), ctypes.c_void_p(pointers)))

    def collect(self, least: int, answers: int) -> int:
        """Wait for at least `least` answers; returns how many came, negative if the kernel refuses."""
        while True:
            num = self._call(
                ctypes.c_long(self._getevents), self._handle, ctypes.c_long(least), ctypes.c_long(DEPTH),
                ctypes.c_void_p(answers), None,
            )  # fmt: skip
            if num >= 0 or ctypes.get_errno() != errno.EINTR:
                return int(num)

    def close(self) -> None:
        """Wait for what is in flight and end the queue. Safe to call twice."""
        handle, self._handle = self._handle, ctypes.c_ulong(0)
        if handle.value:
            self._call(ctypes.c_long(self._destroy), handle)

    def __del__(self) -> None:
        self.close()


_thread = threading.local()


def _context() -> _Context | None:
    """This thread's queue; None if the system gives no more of them. Another one after a fork: they do not survive."""
    if getattr(_thread, "pid", None) != os.getpid():
        _thread.pid = os.getpid()
        try:
            _thread.context = _Context()
        except OSError:
            _thread.context = None
    return _thread.context


def supported() -> bool:
    """Whether batches reach the kernel together here."""
    return platform.machine() in _CALLS and hasattr(os, "O_DIRECT")
