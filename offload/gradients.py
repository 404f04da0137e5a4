"""Gradients: they leave the device unit by unit, accumulate on the host in a fixed order, and wait for the update.

Order of summation, the same for every placement: within one backward, a parameter's contributions are summed in the
order in which backward makes them; the sums of successive backwards are added in fp32 (or stay in the compute dtype
where there is one backward per step, as torch's own would). Micro-batches that take turns in one backward are kept
apart (`turns.TurnSums`) and count as successive backwards.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .homes import Home
from .kernels.gradient import accumulate_, copy_, squared_norm
from .layout import Member, UnitLayout
from .scheduler.devices import Device, Event
from .scheduler.lanes import Lanes
from .scheduler.loop import LoopThread
from .scheduler.pool import Lease
from .scheduler.trace import Wait
from .turns import TurnSums
from .units import Unit

MAX_IN_FLIGHT = 2
MAX_SMALL_IN_FLIGHT, SMALL_NBYTES = 64, 256 << 10
"""Units whose gradients may be on their way home at once. They are memory that no budget counts, so few large ones are;
many small ones, else backward would wait for each one's round trip through threads."""


class Contribution(NamedTuple):
    """A gradient [numel] of `member`, flat; `first` if the step has none of it yet."""

    member: Member
    gradient: Tensor
    first: bool


class Gradients:
    """The gradients of one step.

    Args:
        room: leases host memory for a unit's gradient when gradients rest in the store, or cross a link.
        micro_batches: the backward whose absorption also takes the norms.
        settled: returns when no update of the given units is pending or being stored.

    Attributes: on_landing and on_complete, called on the loop with a unit's index when a gradient for it is on its way,
    and when the unit's gradient of the whole step has come home; on_sum, called with a unit and the sums of one
    backward before they leave the device, returns what to send; last_in_flight, whether gradients of the step's last
    backward have been sent that nobody has waited for, each of which may still complete a unit.
    """

    def __init__(
        self,
        layouts: Sequence[UnitLayout],
        homes: Sequence[dict[str, Home]],
        device: Device,
        lanes: Lanes,
        loop: LoopThread,
        room: Callable[[int, str], Awaitable[Lease]],
        micro_batches: int,
        settled: Callable[[Sequence[Unit]], Awaitable[None]],
    ) -> None:
        self._layouts = layouts
        self._homes = homes
        self._device = device
        self._lanes = lanes
        self._loop = loop
        self._room = room
        self._micro_batches = micro_batches
        self._settled = settled
        self._member = {member.info.parameter: member for layout in layouts for member in layout.members}
        self._unit_of = {p: layout.unit.index for layout in layouts for p in layout.by_parameter}
        self._trainable = [p for p, member in self._member.items() if member.info.trainable]
        self._lock = threading.Lock()
        self._slots = threading.BoundedSemaphore(MAX_IN_FLIGHT)
        self._small_slots = threading.BoundedSemaphore(MAX_SMALL_IN_FLIGHT)
        self._unit_locks: dict[int, asyncio.Lock] = {}
        self._in_flight: list[Future[None]] = []
        self._harvest: dict[nn.Parameter, Tensor] = {}
        self._turns: TurnSums | None = None
        self._arrived_in: dict[nn.Parameter, int] = {}
        self._squares: dict[nn.Parameter, float] = {}
        self._failure: BaseException | None = None
        self.last_in_flight = False
        self.num_backwards = 0
        self.on_landing: Callable[[int], None] = lambda unit: None
        self.on_complete: Callable[[int], None] = lambda unit: None
        self.on_sum: Callable[[Unit, dict[nn.Parameter, Tensor]], dict[nn.Parameter, Tensor]] = lambda unit, sums: sums

    # -- the training (or autograd) thread's side

    def begin_turns(self, num: int, is_open: Callable[[int, int], bool]) -> None:
        """The next backward is that of `num` micro-batches at once; `is_open`: see `TurnSums`."""
        self._turns = TurnSums(num, self._unit_of, is_open)

    def take(self, parameter: nn.Parameter, micro_batch: int = 0, leaf: Tensor | None = None) -> None:
        """Hook behind autograd's accumulation: the gradient is ours from here on.

        Args:
            micro_batch: whose it is, where micro-batches take turns.
            leaf: the tensor that has the gradient, where it stands for `parameter`.
        """
        leaf = parameter if leaf is None else leaf
        gradient, leaf.grad = leaf.grad, None
        if gradient is None:
            return
        if gradient.layout != torch.strided:
            raise TypeError(
                f"parameter {self._member[parameter].info.name!r} has a {gradient.layout} gradient; the engine's "
                "optimizers are dense: build the module with sparse=False"
            )
        with self._lock:
            if self._turns is not None:
                self._turns.take(micro_batch, parameter, gradient)
                return
            held = self._harvest.get(parameter)
            self._harvest[parameter] = gradient if held is None else held + gradient

    def flush(self, unit: int, more_to_come: bool) -> None:
        """Send what was taken for `unit` on its way. Blocks while too many units' gradients are already on theirs.

        Args:
            more_to_come: this backward has more for the unit, so its sum is not complete. Contributions are then held
                back and added as they come, in the dtype in which autograd itself would add them: summed otherwise, a
                budget that cuts a unit into finer ones would change bits.
        """
        if more_to_come:
            return
        with self._lock:
            ready = {p: g for p, g in self._harvest.items() if self._unit_of[p] == unit}
            for parameter in ready:
                del self._harvest[parameter]
        self._send(unit, self.on_sum(self._layouts[unit].unit, ready), complete=True)

    def flush_turn(self, unit: int) -> None:
        """`flush`, where micro-batches take turns: the unit's gradient is sent when it is that of all of them."""
        assert self._turns is not None
        with self._lock:
            gradients = self._turns.complete(unit)
        self._send(unit, gradients, complete=True)

    def unit_of(self, parameter: nn.Parameter) -> int:
        """Index of the unit to which `parameter` belongs."""
        return self._unit_of[parameter]

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        """Those that may have gradients."""
        return self._trainable

    def name_of(self, parameter: nn.Parameter) -> str:
        return self._member[parameter].info.name

    def end_backward(self) -> None:
        """Every contribution of this backward has been taken: send the rest, count it."""
        if self._turns is not None:
            with self._lock:
                last = list(self._turns.rest())
            for unit, gradients in last:
                self._send(unit, gradients)
            self.num_backwards += self._turns.num
            self._turns = None
            return
        with self._lock:
            rest, self._harvest = self._harvest, {}
        by_unit: dict[int, dict[nn.Parameter, Tensor]] = {}
        for parameter, gradient in rest.items():
            by_unit.setdefault(self._unit_of[parameter], {})[parameter] = gradient
        for unit, gradients in by_unit.items():
            self._send(unit, self.on_sum(self._layouts[unit].unit, gradients))
        self.num_backwards += 1

    def _send(self, unit: int, gradients: dict[nn.Parameter, Tensor], complete: bool = False) -> None:
        """`complete`: this backward has nothing more for the unit."""
        if not gradients:
            return
        contributions = []
        for parameter, gradient in gradients.items():
            flat = gradient.detach().reshape(-1)
            contributions.append(Contribution(self._member[parameter], flat, parameter not in self._arrived_in))
        replaced = {c.member.info.parameter for c in contributions if c.first}
        has_earlier = any(p in self._arrived_in and p not in replaced for p in self._layouts[unit].by_parameter)
        for parameter in gradients:
            self._arrived_in.setdefault(parameter, self.num_backwards)
        is_last = self.num_backwards + (self._turns.num if self._turns is not None else 1) >= self._micro_batches
        self.last_in_flight |= is_last
        is_small = sum(c.gradient.nbytes for c in contributions) <= SMALL_NBYTES
        slots = self._small_slots if is_small else self._slots
        self._wait_for_slot(slots, self._layouts[unit].unit.name)
        try:
            future = self._loop.submit(
                self._land(unit, contributions, has_earlier, is_last, complete, *self._pack(contributions))
            )
        except BaseException:
            slots.release()
            raise
        future.add_done_callback(lambda _: slots.release())
        self._in_flight = [f for f in self._in_flight if not f.done() or f.exception() is not None]
        self._in_flight.append(future)

    def _wait_for_slot(self, slots: threading.BoundedSemaphore, unit: str) -> None:
        """Back-pressure: gradients that wait for their way home are memory that no budget counts."""
        if slots.acquire(blocking=False):
            return
        start_s = time.perf_counter()
        slots.acquire()
        self._lanes.trace.add_wait(Wait(start_s, time.perf_counter(), unit))

    def _pack(self, contributions: list[Contribution]) -> tuple[Tensor | None, Event | None]:
        """Where a link must be crossed: one contiguous device buffer of all gradients, and the event behind it."""
        if self._device.one_memory:
            return None, None
        packed = torch.cat([c.gradient.contiguous().view(torch.uint8) for c in by_itemsize(contributions)])
        return packed, self._device.record()

    # -- the loop's side

    async def _land(
        self,
        unit: int,
        contributions: list[Contribution],
        has_earlier: bool,
        is_last: bool,
        complete: bool,
        packed: Tensor | None,
        made: Event | None,
    ) -> None:
        self.on_landing(unit)
        await self._absorb(unit, contributions, has_earlier, is_last, packed, made)
        if is_last and complete:
            self.on_complete(unit)

    async def _absorb(
        self,
        unit: int,
        contributions: list[Contribution],
        has_earlier: bool,
        is_last: bool,
        packed: Tensor | None,
        made: Event | None,
    ) -> None:
        """One unit's gradient on its way home. Serial per unit, in the order in which they were sent.

        Invariant: the last step's update has used the last step's gradient, which lies where this one goes. A unit that
        was called is updated; one whose parameters were only read, as private copies, may not be.
        """
        async with self._unit_locks.setdefault(unit, asyncio.Lock()):
            await self._settled([self._layouts[unit].unit])
            layout, home = self._layouts[unit], self._homes[unit]["grad"]
            total_nbytes = home.nbytes if home.buffer is None else 0
            link_nbytes = packed.numel() if packed is not None else 0
            lease = None
            if total_nbytes + link_nbytes:
                lease = await self._room(total_nbytes + link_nbytes, f"{layout.unit.name}/grad")
            try:
                if packed is not None and lease is not None:
                    landing = lease.buffer[total_nbytes : total_nbytes + link_nbytes]
                    await self._lanes.d2h.run(
                        self._device.download,
                        landing,
                        packed,
                        made,
                        unit=layout.unit.name,
                        kind="grad",
                        nbytes=link_nbytes,
                    )
                    contributions = unpack(contributions, landing)
                if home.buffer is not None:
                    total = home.buffer
                else:
                    total = lease.buffer[:total_nbytes] if lease is not None else torch.empty(0, dtype=torch.uint8)
                    if has_earlier:
                        await home.read_all(total)
                nbytes = sum(c.gradient.nbytes for c in contributions)
                await self._lanes.cpu.run(
                    self._add, layout, total, contributions, is_last, unit=layout.unit.name, kind="grad", nbytes=nbytes
                )
                if home.buffer is None:
                    await home.write_all(total)
            finally:
                if lease is not None:
                    lease.release()

    def _add(self, layout: UnitLayout, total: Tensor, contributions: list[Contribution], is_last: bool) -> None:
        for member, gradient, first in contributions:
            view = layout.grad_view(total, member)
            if first:
                copy_(view, gradient)
            else:
                accumulate_(view, gradient)
            if is_last:
                self._squares[member.info.parameter] = squared_norm(view)

    # -- once per step

    def wait(self) -> None:
        """Block until every gradient that was sent has come home.

        Raises: what a lane raised, again at every call until `drop`: what has landed is not the step's gradient.
        """
        concurrent.futures.wait(self._in_flight)  # may be interrupted, and is then begun anew by the next call
        errors = [error for future in self._in_flight if (error := future.exception()) is not None]
        if self._failure is None and errors:
            self._failure = errors[0]
        self._in_flight = []
        self.last_in_flight = False
        if self._failure is not None:
            raise self._failure

    def total_square(self, names_in_order: Sequence[nn.Parameter]) -> float:
        """The squared global norm: per parameter in fixed blocks in float64, then summed in the order of names.

        Independent of units, chunks, placements and arrival. Takes the norms that no last backward has taken.
        """
        missing = {self._unit_of[p] for p in self._arrived_in if p not in self._squares}
        if missing:
            self._loop.run(self._take_norms(sorted(missing)))
        total = 0.0
        for parameter in names_in_order:
            if parameter in self._squares:
                total += self._squares[parameter]
        return total

    async def _take_norms(self, units: Sequence[int]) -> None:
        for unit in units:
            layout, home = self._layouts[unit], self._homes[unit]["grad"]
            lease = None
            if home.buffer is None:
                lease = await self._room(home.nbytes, f"{layout.unit.name}/grad norm")
            try:
                if lease is None:
                    assert home.buffer is not None
                    total = home.buffer
                else:
                    total = lease.buffer[: home.nbytes]
                    await home.read_all(total)
                await self._lanes.cpu.run(
                    self._squares_of, layout, total, unit=layout.unit.name, kind="grad", nbytes=home.nbytes
                )
            finally:
                if lease is not None:
                    lease.release()

    def _squares_of(self, layout: UnitLayout, total: Tensor) -> None:
        for parameter, member in layout.by_parameter.items():
            if parameter in self._arrived_in and parameter not in self._squares:
                self._squares[parameter] = squared_norm(layout.grad_view(total, member))

    def present(self) -> set[nn.Parameter]:
        """Parameters that have a gradient in this step."""
        return set(self._arrived_in)

    def is_present(self, parameter: nn.Parameter) -> bool:
        return parameter in self._arrived_in

    def forget_norms(self) -> None:
        """Gradients were edited: take all norms anew at the step."""
        self._squares.clear()

    def drop(self) -> None:
        """Forget all gradients of the step, also those on their way (waits for them to land; their errors are moot)."""
        for future in self._in_flight:
            try:
                future.result()
            except Exception:
                continue  # a gradient that is dropped may have failed to land
        self._in_flight = []
        self.last_in_flight = False
        self._failure = None
        with self._lock:
            self._harvest = {}
        self._turns = None
        self._arrived_in = {}
        self._squares = {}
        self.num_backwards = 0


def by_itemsize(contributions: list[Contribution]) -> list[Contribution]:
    """Widest elements first, so that every gradient in a packed buffer is aligned to its own size."""
    return sorted(contributions, key=lambda c: -c.gradient.element_size())


def unpack(contributions: list[Contribution], packed: Tensor) -> list[Contribution]:
    """The contributions again, as views into `packed` (uint8, made by concatenation in `by_itemsize` order)."""
    offset = 0
    unpacked = []
    for member, gradient, first in by_itemsize(contributions):
        nbytes = gradient.numel() * gradient.element_size()
        unpacked.append(Contribution(member, packed[offset : offset + nbytes].view(gradient.dtype), first))
        offset += nbytes
    return unpacked
