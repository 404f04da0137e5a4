"""What the engine asks of a device: allocate, copy both ways, record, wait. Everything above it is one code path."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ..fence import Fence
from ..hostmem import allocate_pages


class Event(Fence, Protocol):
    """A point in the compute order of the thread that recorded it."""

    def time_s(self) -> float:
        """When the event passed, on the `time.perf_counter()` clock. Blocks until it has."""


class HostEvent:
    """An event of a device whose compute is the calling thread itself: passed when it is made, at `time_s` (now)."""

    __slots__ = ("_time_s",)

    def __init__(self, time_s: float | None = None) -> None:
        self._time_s = time.perf_counter() if time_s is None else time_s

    def has_passed(self) -> bool:
        return True

    def synchronize(self) -> None:
        return

    def time_s(self) -> float:
        return self._time_s


class Device(ABC):
    """Where units compute.

    `upload` and `download` are called in the thread of a copy lane and block that thread until the bytes have
    arrived, so whoever awaits the lane owns finished bytes and compute needs no event for them. The other direction
    does: `after` is the compute event behind which the destination may be overwritten or the source is complete.
    `compute` is called in the thread of a lane as well, and blocks it until the results are in device memory.
    """

    name: str
    torch_device: torch.device
    one_memory: bool = False

    @abstractmethod
    def allocate(self, nbytes: int) -> Tensor:
        """An uninitialised uint8 [nbytes] buffer in device memory, at least 64-byte aligned."""

    def allocate_host(self, nbytes: int) -> Tensor:
        """A uint8 [nbytes] page-aligned host buffer that this device can copy from and to quickly."""
        return allocate_pages(nbytes)

    def release_host(self, buffer: Tensor) -> None:
        """Undo what `allocate_host` did beyond taking memory; called before the last reference is dropped."""
        return

    @abstractmethod
    def upload(self, device_buffer: Tensor, host_buffer: Tensor, after: Fence | None) -> None:
        """Copy uint8 host -> device once `after` has passed; returns when the bytes are there."""

    @abstractmethod
    def download(self, host_buffer: Tensor, device_buffer: Tensor, after: Fence | None) -> None:
        """Copy uint8 device -> host once `after` has passed; returns when the bytes are there."""

    def compute(self, work: Callable[..., None], *args: Any) -> None:
        """Call `work(*args)`, which gives kernels to the device beside the training thread's; returns when they have
        run. What they read has arrived before, and nobody else uses what they write."""
        work(*args)

    @abstractmethod
    def record(self) -> Event:
        """An event behind everything that the calling thread has given to compute so far."""

    def poison(self) -> bool:
        """Whether buffers are filled with NaN as soon as they are given back (the fake device does)."""
        return False

    def free_nbytes(self) -> int | None:
        """Free memory of the device in bytes, or None where device and host are the same memory."""
        return None

    def rng_state(self) -> Tensor | None:
        """State of the device's own random generator, or None where it has none beside the CPU's."""
        return None

    def set_rng_state(self, state: Tensor | None) -> None:
        return
