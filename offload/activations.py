"""What autograd saves inside a unit's call: kept for backward while there is memory for it, else computed again.

A kept call keeps its graph. What the graph saves of the unit's parameters lies in the unit's slot, which others will
use before backward comes; so a saved parameter, and every view of one, is kept as (unit, offset, geometry), and made
again from wherever the unit lies when backward needs it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .staged import Staged
from .units import CallSite


@dataclass(frozen=True)
class InSlot:
    """A saved tensor that lies in the slot of the `unit`-th unit of its call. `offset` is in bytes from the slot's
    start."""

    unit: int
    offset: int
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]


@dataclass(frozen=True)
class Saved:
    """Any other saved tensor, and its version when it was saved."""

    tensor: Tensor
    version: int


class SavedTensors:
    """What the graph of one call saves. `nbytes` counts what is held for it beyond slots and the call's own inputs."""

    def __init__(self, site: CallSite, staged: Sequence[Staged], inputs: Sequence[Tensor]) -> None:
        self._site = site
        self._staged: Sequence[Staged] | None = staged
        self._slots = {s.buffer.untyped_storage().data_ptr(): n for n, s in enumerate(staged) if s.buffer.numel()}
        self._counted = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        self._storages: set[int] = set()
        self.nbytes = 0

    @contextlib.contextmanager
    def collected(self) -> Iterator[None]:
        """Around the call's forward."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield
        self._staged = None

    @contextlib.contextmanager
    def within(self, staged: Sequence[Staged]) -> Iterator[None]:
        """Around the call's backward: the units lie here now."""
        self._staged = staged
        try:
            yield
        finally:
            self._staged = None

    def holds_storage(self, tensor: Tensor) -> bool:
        """Whether something saved shares memory with `tensor`."""
        return tensor.untyped_storage().data_ptr() in self._storages

    def _pack(self, tensor: Tensor) -> InSlot | Saved:
        address = tensor.untyped_storage().data_ptr()
        unit = self._slots.get(address)
        if unit is not None and tensor.numel():
            assert self._staged is not None, "a slot's address is known only while its unit is held"
            start = self._staged[unit].buffer.storage_offset()
            offset = int(tensor.storage_offset()) * tensor.element_size() - int(start)
            return InSlot(unit, offset, tensor.dtype, tensor.size(), tensor.stride())
        self._storages.add(address)
        if address not in self._counted:
            self._counted.add(address)
            self.nbytes += tensor.untyped_storage().nbytes()
        # Not the tensor itself: a saved result would keep its own graph alive for ever.
        return Saved(tensor.detach(), tensor._version)

    def _unpack(self, kept: InSlot | Saved) -> Tensor:
        if isinstance(kept, Saved):
            if kept.tensor._version != kept.version:
                raise RuntimeError(
                    f"a tensor of shape {list(kept.tensor.shape)} that unit {self._site.name!r} needs for its backward "
                    "was changed by an in-place operation after it was computed; make the change to a copy"
                )
            return kept.tensor
        if self._staged is None:
            raise RuntimeError(used_outside(self._site))
        buffer = self._staged[kept.unit].buffer
        whole = torch.empty(0, dtype=kept.dtype, device=buffer.device)
        start = buffer.storage_offset() + kept.offset
        return whole.set_(buffer.untyped_storage(), start // kept.dtype.itemsize, kept.size, kept.stride)


def used_outside(site: CallSite) -> str:
    """What is said to who goes backward through a tensor from inside a call."""
    return (
        f"the graph inside unit {site.name!r} was used outside of the engine's backward; call engine.backward(loss) or "
        "loss.backward() on what the module returned, and let what a hook on an inner module collects be returned, or "
        "left in an attribute of a module"
    )


class ActivationBudget:
    """Decides which calls keep what autograd saves. Touched by the training thread, autograd's threads and the garbage
    collector, so the lock is re-entrant.

    A call site is kept once its size is known from an earlier call and fits beside what is kept now; one that turns out
    larger than it was is dropped again and computed anew in backward.

    Args:
        capacity_nbytes: bytes that may be kept at once; 0 keeps nothing.
    """

    def __init__(self, capacity_nbytes: int) -> None:
        self.capacity_nbytes = capacity_nbytes
        self._lock = threading.RLock()
        self._size_of: dict[int, int] = {}
        self.held_nbytes = 0
        self.peak_nbytes = 0

    def may_keep(self, site: CallSite) -> bool:
        """Whether the next call of `site` should be kept, as far as one can tell."""
        if not self.capacity_nbytes:
            return False
        return self.held_nbytes + self._size_of.get(id(site), 0) <= self.capacity_nbytes

    def keep(self, site: CallSite, nbytes: int) -> bool:
        """Account for a call that saved `nbytes`. False if it is too much: the call must drop them."""
        with self._lock:
            self._size_of[id(site)] = nbytes
            if self.held_nbytes + nbytes > self.capacity_nbytes:
                return False
            self.held_nbytes += nbytes
            self.peak_nbytes = max(self.peak_nbytes, self.held_nbytes)
            return True

    def let_go(self, nbytes: int) -> None:
        with self._lock:
            self.held_nbytes -= nbytes
