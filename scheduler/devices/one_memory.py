"""Without an accelerator device and host are the same memory: bytes compute where they arrive."""

from __future__ import annotations

import torch
from torch import Tensor

from ..fence import Fence
from ..hostmem import allocate_pages
from .interface import Device, Event, HostEvent


class OneMemoryDevice(Device):
    """The CPU. Nothing is copied, so both copies are errors: a caller that asks for one has a second code path."""

    name = "cpu"
    one_memory = True

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")

    def allocate(self, nbytes: int) -> Tensor:
        return allocate_pages(nbytes)

    def upload(self, device_buffer: Tensor, host_buffer: Tensor, after: Fence | None) -> None:
        raise AssertionError("one memory: a host buffer is already where it computes")

    def download(self, host_buffer: Tensor, device_buffer: Tensor, after: Fence | None) -> None:
        raise AssertionError("one memory: a device buffer is already host memory")

    def record(self) -> Event:
        return HostEvent()
