"""One unit's way from its home to where it computes. A pending update is made on the way."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from typing import Any

from torch import Tensor

from .homes import ChunkStream, Home, gather_all
from .layout import UnitLayout
from .scheduler.devices import Device
from .scheduler.fence import Fence
from .scheduler.lanes import Lanes
from .scheduler.pool import Lease, Pool
from .units import Unit
from .updates import Pending, PendingUpdates


class Journeys:
    """Moves units. Who may move which unit, and where to, is decided elsewhere (`Residency`).

    The host form of a unit is its param and frozen range in host memory (uint8 [staged_nbytes]): the buffer in which it
    rests, or the slot where device and host are one memory, or else a bounce buffer.

    Args:
        resting: for each unit, its host form where that rests in host memory, else None.
        bounce: host memory on the way to a device with a memory of its own.
        stream: the ring through which states stream.
        updates: is told of an update that broke off.

    Attributes: on_stored, called on the loop whenever a unit has been stored; before_update, awaited with a unit's
    index before its update changes a byte.
    """

    def __init__(
        self,
        layouts: Sequence[UnitLayout],
        homes: Sequence[dict[str, Home]],
        resting: Sequence[Tensor | None],
        device: Device,
        lanes: Lanes,
        bounce: Pool,
        stream: ChunkStream,
        updates: PendingUpdates,
    ) -> None:
        self._layouts = layouts
        self._homes = homes
        self._resting = resting
        self._device = device
        self._lanes = lanes
        self._bounce = bounce
        self._stream = stream
        self._updates = updates
        self._storing: dict[int, asyncio.Task[None]] = {}
        self.on_stored: Callable[[], None] = lambda: None
        self.before_update: Callable[[int], Awaitable[None]] = _at_once

    def rests_in_place(self, unit: int) -> bool:
        """Whether the unit computes from where it rests, so that it needs no slot."""
        return self._device.one_memory and self._resting[unit] is not None

    def update_nbytes(self, unit: int) -> int:
        """Bytes that the unit's update works on."""
        return sum(self._layouts[unit].nbytes(kind) for kind in ("param", "states", "grad"))

    async def fetch(
        self,
        unit: Unit,
        slot: Tensor | None,
        needed: int,
        pending: Pending | None,
        old_in_slot: bool,
        after: Fence | None = None,
    ) -> Tensor:
        """Fill `slot` with the unit's parameters, after making its pending update if it has one.

        What the update has changed is still being stored when this returns (`is_storing`), from the returned buffer
        where that is host memory: until then it must not change or go.

        Args:
            slot: uint8 [staged_nbytes] on the device; None where the unit computes from where it rests.
            old_in_slot: the slot still holds the parameters that the update starts from.
            after: what compute may still read of the buffer to compute from; nothing is written into it before.

        Returns: the buffer to compute from.
        """
        resting = self._resting[unit.index]
        lease: Lease | None = None
        if self._device.one_memory:
            await self.passed(after, unit.name)
        if resting is not None:
            host = resting
        elif self._device.one_memory:
            assert slot is not None, "only a unit that rests in place computes without a slot"
            host = slot
        else:
            assert slot is not None, "a device with a memory of its own computes from slots"
            lease = await self._bounce.acquire(slot.numel(), f"{unit.name}/param on its way")
            host = lease.buffer[: slot.numel()]
        try:
            if pending is not None:
                await self._update(unit, host, needed, pending, host is slot and old_in_slot)
            elif resting is None:
                await self._read(unit, host, needed)
            if slot is not None and host is not slot:
                await self._upload(unit, slot, host, after)
        finally:
            if lease is not None:
                self._release_stored(unit.index, lease)
        return slot if slot is not None else host

    async def update_in_passing(self, unit: Unit, needed: int, pending: Pending) -> None:
        """Make and store the update of a unit that nobody is about to use: all of it streams through the ring."""
        with self._noted(pending):
            await self._may_begin(unit, pending)
            work = pending.update.run(self._stream, self._homes[unit.index], needed=needed)
            await self._store_behind(unit, pending, work)

    async def _may_begin(self, unit: Unit, pending: Pending) -> None:
        """Invariant: nothing changes what the update before is still storing, or what is not yet durable, or not yet
        copied into a checkpoint of the step before."""
        await self.stored(unit.index)
        await pending.begin()
        await self.before_update(unit.index)

    def is_storing(self, unit: int) -> bool:
        """Whether an update of the unit is still being stored."""
        return unit in self._storing

    async def stored(self, unit: int) -> None:
        """Return when nothing of the unit is being stored any more. Raises: what went wrong."""
        task = self._storing.get(unit)
        if task is not None:
            await asyncio.shield(task)

    async def _update(self, unit: Unit, host: Tensor, needed: int, pending: Pending, present: bool) -> None:
        """Returns when all new parameters are in `host`."""
        layout, homes = self._layouts[unit.index], self._homes[unit.index]
        boundary = layout.nbytes("param")
        held = {} if homes["param"].buffer is not None else {"param": host[:boundary]}
        computed = asyncio.get_running_loop().create_future()
        left = pending.update.num_chunks

        def one_computed() -> None:
            nonlocal left
            left -= 1
            if not left and not computed.done():
                computed.set_result(None)

        with self._noted(pending):
            await self._may_begin(unit, pending)
            storing = self._store_behind(
                unit,
                pending,
                pending.update.run(
                    self._stream, homes, held=held, present=present, computed=one_computed, needed=needed
                ),
            )
            try:
                if homes["frozen"].nbytes and homes["frozen"].buffer is None and not present:
                    await homes["frozen"].read_all(host[boundary : layout.staged_nbytes], needed)
                await asyncio.wait([storing, computed], return_when=asyncio.FIRST_COMPLETED)
            except BaseException:
                storing.cancel()
                await asyncio.wait([storing])
                raise
            if storing.done():
                storing.result()

    @contextlib.contextmanager
    def _noted(self, pending: Pending) -> Iterator[None]:
        """Once an update has been taken, whatever keeps it from being made leaves parameters of two steps."""
        try:
            yield
        except BaseException as error:
            self._updates.failed(pending, error)
            raise

    def _store_behind(self, unit: Unit, pending: Pending, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._storing[unit.index] = task
        task.add_done_callback(lambda done: self._stored(unit.index, pending, done))
        return task

    def _stored(self, unit: int, pending: Pending, task: asyncio.Task[None]) -> None:
        del self._storing[unit]
        if task.cancelled():
            self._updates.failed(pending, asyncio.CancelledError("the engine was closed in the middle of an update"))
        elif (error := task.exception()) is not None:
            self._updates.failed(pending, error)
        else:
            pending.made.set_result(None)
        self.on_stored()

    def _release_stored(self, unit: int, lease: Lease) -> None:
        """Give a buffer back once nothing is stored from it any more."""
        task = self._storing.get(unit)
        if task is None:
            lease.release()
        else:
            task.add_done_callback(lambda _: lease.release())

    async def _read(self, unit: Unit, into: Tensor, needed: int) -> None:
        layout, homes = self._layouts[unit.index], self._homes[unit.index]
        boundary = layout.nbytes("param")
        await gather_all(
            home.read_all(into[first:last], needed)
            for home, first, last in (
                (homes["param"], 0, boundary),
                (homes["frozen"], boundary, layout.staged_nbytes),
            )
            if home.nbytes
        )

    async def _upload(self, unit: Unit, slot: Tensor, source: Tensor, after: Fence | None) -> None:
        await self._lanes.h2d.run(
            self._device.upload, slot, source, after, unit=unit.name, kind="param", nbytes=source.numel()
        )

    async def passed(self, fence: Fence | None, holder: str) -> None:
        """Return when `fence` has passed; it is waited for in a lane's thread."""
        if fence is not None and not fence.has_passed():
            await self._lanes.cpu.run(fence.synchronize, unit=holder, kind="wait", nbytes=0)


async def _at_once(unit: int) -> None:
    """Nobody copies anything."""
