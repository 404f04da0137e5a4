"""What surrounds a call and changes its numbers: random generators and autocast. Kept for the recomputation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .scheduler.devices import Device


@dataclass(frozen=True, eq=False)
class RandomState:
    """State of the CPU's generator and of the device's own."""

    cpu: Tensor
    device: Tensor | None

    @classmethod
    def capture(cls, device: Device) -> RandomState:
        return cls(torch.get_rng_state(), device.rng_state())

    def restore(self, device: Device) -> None:
        torch.set_rng_state(self.cpu)
        device.set_rng_state(self.device)


@contextlib.contextmanager
def replayed(state: RandomState, device: Device) -> Iterator[None]:
    """Inside, random numbers repeat from `state`; afterwards the generators go on as if nothing had happened."""
    now = RandomState.capture(device)
    state.restore(device)
    try:
        yield
    finally:
        now.restore(device)


@dataclass(frozen=True)
class Autocast:
    """Autocast settings of the calling thread, per device type."""

    settings: tuple[tuple[str, bool, torch.dtype], ...]

    @classmethod
    def capture(cls, device: Device) -> Autocast:
        types = dict.fromkeys(("cpu", device.torch_device.type))
        return cls(tuple((t, torch.is_autocast_enabled(t), torch.get_autocast_dtype(t)) for t in types))

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """These settings, without the cache in which autocast keeps cast copies of weights."""
        with contextlib.ExitStack() as stack:
            for device_type, enabled, dtype in self.settings:
                if enabled or torch.is_autocast_enabled(device_type):
                    stack.enter_context(torch.autocast(device_type, dtype=dtype, enabled=enabled, cache_enabled=False))
            yield
