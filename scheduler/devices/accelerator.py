"""A real accelerator through `torch.accelerator`: copy streams, events and pinned host memory."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..fence import Fence
from ..hostmem import allocate_pages
from .interface import Device, Event

log = logging.getLogger("offload")


class StreamEvent:
    """A device event with timing; `time_s` is reckoned from a base event whose host time is known."""

    __slots__ = ("_device", "_event")

    def __init__(self, device: AcceleratorDevice, event: torch.Event) -> None:
        self._device = device
        self._event = event

    def wait_on(self, stream: torch.Stream) -> None:
        stream.wait_event(self._event)

    def has_passed(self) -> bool:
        return bool(self._event.query())

    def synchronize(self) -> None:
        self._event.synchronize()

    def time_s(self) -> float:
        self._event.synchronize()
        return self._device.base_s + self._device.base_event.elapsed_time(self._event) / 1e3


class AcceleratorDevice(Device):
    """CUDA, XPU or whatever `torch.accelerator` reports.

    Streams, each used by one lane's only thread:
        h2d: host -> slot copies; the slot's last reader on compute -> h2d (event `after`) -> host waits.
        d2h: gradient -> host copies; the gradient's writer on compute -> d2h (event `after`) -> host waits.
        update: optimizer kernels on chunks of states; the host has waited for h2d -> update -> host waits -> d2h.
    The compute stream is never cached: it is whatever stream is current in the thread that records.
    """

    def __init__(self, torch_device: torch.device) -> None:
        index = torch_device.index if torch_device.index is not None else torch.accelerator.current_device_index()
        self.torch_device = torch.device(torch_device.type, index)
        self.name = str(self.torch_device)
        self._module = torch.get_device_module(self.torch_device)
        self._h2d = torch.Stream(device=self.torch_device)
        self._d2h = torch.Stream(device=self.torch_device)
        self._update = torch.Stream(device=self.torch_device)
        self.base_event = torch.Event(device=self.torch_device, enable_timing=True)
        self.base_event.record(torch.accelerator.current_stream(self.torch_device))
        self.base_event.synchronize()
        self.base_s = time.perf_counter()
        self._pin_lock = threading.Lock()
        self._pinning_refused = False
        self._registered: set[int] = set()

    def allocate(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.torch_device)

    def allocate_host(self, nbytes: int) -> Tensor:
        """Pinned pages of exactly this size; pageable with one warning where the system refuses to pin."""
        pages = allocate_pages(nbytes)
        if nbytes and not self._pinning_refused and not self._register(pages):
            with self._pin_lock:
                if not self._pinning_refused:
                    self._pinning_refused = True
                    log.warning(
                        "the system refused to pin %d bytes of host memory; copies go through pageable memory from "
                        "here on, which is slower (raise `ulimit -l` or lower host_memory)",
                        nbytes,
                    )
        return pages

    def _register(self, pages: Tensor) -> bool:
        """Register `pages` with the CUDA driver until `release_host`. True where that is not needed."""
        if self.torch_device.type != "cuda":
            return True
        with torch.cuda.device(self.torch_device):
            if int(self._module.cudart().cudaHostRegister(pages.data_ptr(), pages.numel(), 0)) != 0:
                return False
        with self._pin_lock:
            self._registered.add(pages.data_ptr())
        return True

    def release_host(self, buffer: Tensor) -> None:
        """Unregister before the mapping goes: the driver must never hold pages that the system has taken back."""
        with self._pin_lock:
            if buffer.data_ptr() not in self._registered:
                return
            self._registered.remove(buffer.data_ptr())
        with torch.cuda.device(self.torch_device):
            self._module.cudart().cudaHostUnregister(buffer.data_ptr())

    def upload(self, device_buffer: Tensor, host_buffer: Tensor, after: Fence | None) -> None:
        self._copy(self._h2d, device_buffer, host_buffer, after)

    def download(self, host_buffer: Tensor, device_buffer: Tensor, after: Fence | None) -> None:
        self._copy(self._d2h, host_buffer, device_buffer, after)

    def _copy(self, stream: torch.Stream, dst: Tensor, src: Tensor, after: Fence | None) -> None:
        if isinstance(after, StreamEvent):
            after.wait_on(stream)  # without it the copy reads (or overwrites) bytes that compute still makes (or reads)
        elif after is not None:
            after.synchronize()
        with stream:
            dst.copy_(src, non_blocking=True)
        stream.synchronize()

    def compute(self, work: Callable[..., None], *args: Any) -> None:
        with self._update:
            work(*args)
        self._update.synchronize()

    def record(self) -> Event:
        event = torch.Event(device=self.torch_device, enable_timing=True)
        event.record(torch.accelerator.current_stream(self.torch_device))
        return StreamEvent(self, event)

    def free_nbytes(self) -> int | None:
        free, _ = self._module.mem_get_info(self.torch_device)
        return int(free)

    def rng_state(self) -> Tensor | None:
        return self._module.get_rng_state(self.torch_device)

    def set_rng_state(self, state: Tensor | None) -> None:
        if state is not None:
            self._module.set_rng_state(state, self.torch_device)
