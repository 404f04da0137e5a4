"""Many small reads in one call: the kernel's own asynchronous I/O, used through bare system calls.

A thread per read cannot keep a drive busy with 4 KiB requests: waking a thread costs more than the read. Here one
thread hands the kernel `DEPTH` requests at a time and collects whole handfuls of answers.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import platform
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .backend import ALIGN_NBYTES, StorageFile
from .files import PosixFile
from .transfer import read_fully

DEPTH = 256
_CALLS = {"x86_64": (206, 207, 208, 209), "aarch64": (0, 1, 4, 2)}  # io_setup, io_destroy, io_getevents, io_submit
_OPCODE_READ = 0
_REQUEST = np.dtype(
    [("data", "u8"), ("key", "u4"), ("flags", "u4"), ("opcode", "u2"), ("priority", "i2"), ("descriptor", "u4"),
     ("address", "u8"), ("nbytes", "u8"), ("offset", "i8"), ("reserved", "u8"), ("more", "u4"), ("event", "u4")]
)  # fmt: skip
_ANSWER = np.dtype([("data", "u8"), ("request", "u8"), ("moved", "i8"), ("moved2", "i8")])

Look = Callable[[np.ndarray], Any]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ReadBatch:
    """Reads to be done together: arrays with one entry per read, so that nothing is done piece by piece in Python.

    Attributes:
        files: the different files.
        file: int64 [n], index in `files`.
        offset: int64 [n], first byte in the file.
        address: int64 [n], where in memory the bytes go; the caller keeps that memory alive and untouched.
        nbytes: int64 [n].
    """

    files: Sequence[StorageFile]
    file: np.ndarray
    offset: np.ndarray
    address: np.ndarray
    nbytes: np.ndarray

    def __len__(self) -> int:
        return len(self.file)

    def views(self) -> list[np.ndarray]:
        """The memory of each read, as writable uint8 arrays. Neighbours of one size are made together."""
        apart = (self.address[1:] != self.address[:-1] + self.nbytes[:-1]) | (self.nbytes[1:] != self.nbytes[:-1])
        edges = [0, *(np.flatnonzero(apart) + 1).tolist(), len(self)]
        views: list[np.ndarray] = []
        for start, end in itertools.pairwise(edges):
            size = int(self.nbytes[start])
            memory = (ctypes.c_ubyte * (size * (end - start))).from_address(int(self.address[start]))
            views += list(np.frombuffer(memoryview(memory), dtype=np.uint8).reshape(end - start, size))
        return views


def read_batch(batch: ReadBatch, look: Look | None = None) -> tuple[int, list[Any]]:
    """Do every read of `batch`. Blocks. Returns how many requests had to be retried, and what `look` made of each read.

    `look` gets the filled memory of one read, in this thread, as soon as its bytes are there and while the drive is
    busy with others: for checksums. Without it the results are None.

    Aligned reads of files with direct I/O go to the kernel together; all others, and every request that came back
    short or failed, go through `read_fully`, so retries and errors are the same. Raises: OffloadIOError, and what
    `look` raises.
    """
    if not len(batch):
        return 0, []
    views, seen, num_retries = batch.views(), [None] * len(batch), 0
    descriptors = np.array([file.direct_descriptor if isinstance(file, PosixFile) else -1 for file in batch.files])
    aligned = (batch.offset | batch.address | batch.nbytes) % ALIGN_NBYTES == 0
    together = np.flatnonzero(aligned & (descriptors[batch.file] >= 0) & (batch.nbytes > 0))
    left = np.ones(len(batch), dtype=bool)
    if len(together) > 1 and platform.machine() in _CALLS:
        left[_read_together(batch, together, descriptors, views, look, seen)] = False
    for index in np.flatnonzero(left).tolist():
        file = batch.files[int(batch.file[index])]
        num_retries += read_fully(file, views[index].data, int(batch.offset[index]))
        seen[index] = look(views[index]) if look else None
    return num_retries, seen


def _read_together(
    batch: ReadBatch, chosen: np.ndarray, descriptors: np.ndarray, views: list[np.ndarray], look: Look | None,
    seen: list[Any],
) -> list[int]:  # fmt: skip
    """Read what the kernel reads in full; returns the indices of those requests. Never raises for a failed read.

    Invariant: when this returns or raises, no request is in flight; the kernel would go on writing into the buffers.
    """
    context = _context()
    if context is None:
        return []  # the system's limit of asynchronous requests is used up: the plain way does it all
    total = len(chosen)
    requests = np.zeros(total, dtype=_REQUEST)
    requests["data"] = chosen
    requests["opcode"] = _OPCODE_READ
    requests["descriptor"] = descriptors[batch.file[chosen]]
    requests["address"] = batch.address[chosen]
    requests["nbytes"] = batch.nbytes[chosen]
    requests["offset"] = batch.offset[chosen]
    pointers = np.arange(total, dtype=np.uint64) * _REQUEST.itemsize + np.uint64(requests.ctypes.data)
    answers = np.zeros(total + DEPTH, dtype=_ANSWER)
    at_pointers, at_answers = pointers.ctypes.data, answers.ctypes.data
    sent, got, refused, done, fresh = 0, 0, False, [], []  # type: int, int, bool, list[int], list[int]
    try:
        while got < sent or (sent < total and not refused):
            room = min(DEPTH - (sent - got), total - sent)
            if room and not refused:
                taken = context.submit(room, at_pointers + pointers.itemsize * sent)
                refused = taken <= 0
                sent += max(0, taken)
            _look_at(fresh, views, look, seen)  # only now: the drive has its next requests
            fresh = []
            if sent > got:
                num = context.collect(max(1, (sent - got) // 4), at_answers + _ANSWER.itemsize * got)
                if num < 0:
                    _forget(context)
                    break
                part = answers[got : got + num]
                which = part["data"].astype(np.int64)
                fresh = which[part["moved"] == batch.nbytes[which]].tolist()
                done += fresh
                got += num
        _look_at(fresh, views, look, seen)
    except BaseException:
        _forget(context)
        raise
    return done


def _look_at(fresh: list[int], views: list[np.ndarray], look: Look | None, seen: list[Any]) -> None:
    if look is not None:
        for index in fresh:
            seen[index] = look(views[index])


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


def _forget(context: _Context) -> None:
    """End this thread's queue; returns only when nothing is in flight any more. The next batch makes another."""
    context.close()
    _thread.pid = None


def supported() -> bool:
    """Whether batches reach the kernel together here."""
    return platform.machine() in _CALLS and hasattr(os, "O_DIRECT")
