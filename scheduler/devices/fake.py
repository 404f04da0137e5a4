"""The fake device of tests and rigs: an arena of its own, slow copies on other threads, poison on release."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..fence import Fence
from ..hostmem import allocate_pages
from .interface import Device, Event, HostEvent


class _Direction:
    """One direction of the link: copies go through it one after another."""

    def __init__(self, gb_s: float | None) -> None:
        if gb_s is not None and not gb_s > 0:
            raise ValueError(f"the bandwidth of a link must be above zero, got {gb_s} GB/s")
        self._gb_s = gb_s
        self._lock = threading.Lock()
        self._busy_until_s = 0.0

    def book(self, nbytes: int) -> float:
        """Take the next free stretch for `nbytes`; returns when it ends, on the clock of `time.perf_counter`."""
        with self._lock:
            start_s = max(time.perf_counter(), self._busy_until_s)
            self._busy_until_s = start_s + (nbytes / (self._gb_s * 1e9) if self._gb_s is not None else 0.0)
            return self._busy_until_s


class FakeDevice(Device):
    """A device in host memory that behaves like a hurried accelerator with a slow link.

    Copies run in the copy lanes' threads, wait a random time first and write their destination in two halves
    with a pause between them, so that a reader who does not wait sees NaN or half a tensor. Kernels begin after a
    random time as well, so that who does not wait for them sees what was there before. Buffers that are given back are
    filled with NaN bytes at once, so that a reader who holds on to one computes NaN. With a bandwidth a copy
    takes at least its bytes over it; the two directions do not disturb each other.

    Args:
        seed: of the random delays.
        max_delay_s: each copy waits a uniform time in [0, max_delay_s) twice, each kernel once.
        capacity_nbytes: what `free_nbytes` says, for device_memory="auto".
        h2d_gb_s, d2h_gb_s: bandwidth to and from the device in 1e9 bytes per second; None: as fast as memory.
    """

    name = "fake"

    def __init__(
        self,
        seed: int = 0,
        max_delay_s: float = 0.002,
        capacity_nbytes: int = 1 << 30,
        h2d_gb_s: float | None = None,
        d2h_gb_s: float | None = None,
    ) -> None:
        self.torch_device = torch.device("cpu")
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._max_delay_s = max_delay_s
        self._capacity_nbytes = capacity_nbytes
        self._h2d = _Direction(h2d_gb_s)
        self._d2h = _Direction(d2h_gb_s)

    def allocate(self, nbytes: int) -> Tensor:
        return allocate_pages(nbytes).fill_(0xFF)

    def upload(self, device_buffer: Tensor, host_buffer: Tensor, after: Fence | None) -> None:
        self._copy(device_buffer, host_buffer, after, self._h2d)

    def download(self, host_buffer: Tensor, device_buffer: Tensor, after: Fence | None) -> None:
        self._copy(host_buffer, device_buffer, after, self._d2h)

    def _copy(self, dst: Tensor, src: Tensor, after: Fence | None, direction: _Direction) -> None:
        if dst.numel() != src.numel():
            raise ValueError(f"copy of {src.numel()} bytes into a buffer of {dst.numel()} bytes")
        if after is not None:
            after.synchronize()
        end_s = direction.book(src.numel())
        half = src.numel() // 2
        for part in (slice(0, half), slice(half, None)):
            self._dawdle()
            dst[part].copy_(src[part])
        rest_s = end_s - time.perf_counter()
        if rest_s > 0:
            time.sleep(rest_s)

    def compute(self, work: Callable[..., None], *args: Any) -> None:
        self._dawdle()
        work(*args)

    def _dawdle(self) -> None:
        with self._lock:
            delay_s = self._random.uniform(0.0, self._max_delay_s)
        time.sleep(delay_s)

    def record(self) -> Event:
        return HostEvent()

    def poison(self) -> bool:
        return True

    def free_nbytes(self) -> int | None:
        return self._capacity_nbytes
