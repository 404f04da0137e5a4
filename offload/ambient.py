"""What surrounds running code and changes its numbers: random generators, autocast, grad mode and other switches.

Kept for the recomputation of a call, and exchanged where several forwards take turns in one thread.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from .scheduler.devices import Device


@dataclass(frozen=True, eq=False)
class RandomState:
    """State of the CPU's generator and of the device's own."""

    cpu: Tensor
    device: Tensor | None

    @classmethod
    def capture(cls, device: Device) -> RandomState:
        return cls(torch.get_rng_state(), device.rng_state())

    @classmethod
    def seeded(cls, seed: int, device: Device) -> RandomState:
        """The state of freshly seeded generators. They are left in it."""
        torch.default_generator.manual_seed(seed)
        if device.rng_state() is not None:
            torch.get_device_module(device.torch_device).manual_seed(seed)
        return cls.capture(device)

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


def collector() -> dict[str, Any] | None:
    """Where Hugging Face's hooks put outputs of inner modules (attentions, router logits) just now, if anywhere."""
    active = _active_collector()
    return None if active is None else active.get()


@contextlib.contextmanager
def collecting(outputs: dict[str, Any] | None) -> Iterator[None]:
    """Inside, such outputs are put into `outputs`; None: nowhere."""
    active = _active_collector()
    if active is None:
        yield
        return
    token = active.set(outputs)
    try:
        yield
    finally:
        active.reset(token)


def _active_collector() -> Any:
    """transformers' context variable, if that has been imported and has one."""
    return getattr(sys.modules.get("transformers.utils.output_capturing"), "_active_collector", None)


_cuda = torch.backends.cuda
_SWITCHES: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.is_grad_enabled, torch._C._set_grad_enabled),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
    (torch.is_anomaly_enabled, torch.set_anomaly_enabled),
    (_cuda.flash_sdp_enabled, _cuda.enable_flash_sdp),
    (_cuda.mem_efficient_sdp_enabled, _cuda.enable_mem_efficient_sdp),
    (_cuda.math_sdp_enabled, _cuda.enable_math_sdp),
    (_cuda.cudnn_sdp_enabled, _cuda.enable_cudnn_sdp),
)
"""What code switches with a context manager, as pairs of reader and writer."""


@dataclass(frozen=True, eq=False)
class Surroundings:
    """Everything in which a piece of code runs and that it may have changed for a while when it is paused.

    Beside random generators and autocast: grad mode, default dtype, anomaly detection, the choice of attention
    kernels, and the stack of saved-tensor hooks (non-reentrant checkpointing and `save_on_cpu` push to it).
    """

    random: RandomState
    autocast: Autocast
    switches: tuple[Any, ...]
    saved_tensor_hooks: tuple[tuple[Callable[..., Any], Callable[..., Any]], ...]

    @classmethod
    def capture(cls, device: Device) -> Surroundings:
        hooks = _take_saved_tensor_hooks()
        _push_saved_tensor_hooks(hooks)
        switches = tuple(read() for read, _ in _SWITCHES)
        return cls(RandomState.capture(device), Autocast.capture(device), switches, hooks)

    def with_random(self, random: RandomState) -> Surroundings:
        return replace(self, random=random)

    def restore(self, device: Device) -> None:
        self.random.restore(device)
        for device_type, enabled, dtype in self.autocast.settings:
            torch.set_autocast_enabled(device_type, enabled)
            torch.set_autocast_dtype(device_type, dtype)
        torch.clear_autocast_cache()  # cast copies that carry the graph of somebody else's forward
        for (read, write), value in zip(_SWITCHES, self.switches, strict=True):
            if read() != value:
                write(value)
        _take_saved_tensor_hooks()
        _push_saved_tensor_hooks(self.saved_tensor_hooks)


def _take_saved_tensor_hooks() -> tuple[tuple[Callable[..., Any], Callable[..., Any]], ...]:
    """Empty the thread's stack of saved-tensor hooks; returns what was in it, the innermost first."""
    taken = []
    while (hooks := torch._C._autograd._top_saved_tensors_default_hooks(True)) is not None:
        taken.append(hooks)
        torch._C._autograd._pop_saved_tensors_default_hooks()
    return tuple(taken)


def _push_saved_tensor_hooks(hooks: tuple[tuple[Callable[..., Any], Callable[..., Any]], ...]) -> None:
    for pack, unpack in reversed(hooks):
        torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)


def in_functional_transform() -> bool:
    """Whether a torch.func transform runs; False where this torch does not say."""
    return bool(getattr(torch._C, "_are_functorch_transforms_active", lambda: False)())


def fixed_surroundings() -> tuple[Any, ...]:
    """What surrounds running code too and cannot be taken off and put back: code that changed it cannot be paused."""
    return (
        torch.is_inference_mode_enabled(),
        in_functional_transform(),
        torch._C._autograd._saved_tensors_hooks_is_enabled(),  # type: ignore[attr-defined]
        *map(id, _get_current_function_mode_stack()),
        *map(id, _get_current_dispatch_mode_stack()),
    )
