"""Which units' parameters are on the device, and who may use them: fetch, prefetch, hold, let go, evict."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future

from torch import Tensor, nn

from .homes import Home, gather_all
from .layout import UnitLayout
from .order import UseOrder
from .scheduler.devices import Device, Event
from .scheduler.lanes import Lanes
from .scheduler.loop import LoopThread
from .scheduler.pool import BudgetExceeded, Lease, Pool
from .scheduler.storage import NEEDED_NOW, NEEDED_SOON
from .scheduler.trace import Wait
from .units import Unit


class Staged:
    """One unit on the device. `holds` counts who uses it; `last_use` is the compute event of the last use."""

    __slots__ = ("buffer", "holds", "last_use", "lease", "views")

    def __init__(self, layout: UnitLayout, buffer: Tensor, lease: Lease | None) -> None:
        self.buffer = buffer
        self.lease = lease
        self.views: dict[nn.Parameter, Tensor] = layout.param_views(buffer)
        self.holds = 0
        self.last_use: Event | None = None


class Residency:
    """Brings units to the device and takes them away.

    Guarantees:
        A unit that is held is never evicted or overwritten.
        A prefetch never waits for room: it takes what is free or can be evicted at once, so it cannot stand in the
        way of a fetch that somebody waits for.
        A fetch that somebody waits for waits only for leases whose owners make progress without it.

    Where a unit's parameters rest in host memory and the device shares it, the unit computes from where it rests.

    Args:
        resting: for each unit, its staged form (uint8 [staged_nbytes]) where that rests in host memory, else None.
        pool: where staged units are leased from: the device's slots, or host memory where they are one memory.
        bounce: host staging on the way to a device with a memory of its own.
    """

    def __init__(
        self,
        layouts: Sequence[UnitLayout],
        homes: Sequence[dict[str, Home]],
        resting: Sequence[Tensor | None],
        device: Device,
        lanes: Lanes,
        loop: LoopThread,
        pool: Pool,
        bounce: Pool,
        order: UseOrder,
    ) -> None:
        self._layouts = layouts
        self._homes = homes
        self._resting = resting
        self._device = device
        self._lanes = lanes
        self._loop = loop
        self._pool = pool
        self._bounce = bounce
        self._order = order
        self._lock = threading.Lock()
        self._staged: dict[int, Staged] = {}
        self._fetching: dict[int, asyncio.Task[None]] = {}
        self._changed: list[asyncio.Future[None]] = []
        self._withdrawn: set[int] = set()
        self._prefetch_asked = False

    # -- the training thread's side

    def acquire(self, units: Sequence[Unit]) -> list[Staged]:
        """Hold `units` on the device; blocks until they are there. Every hold is ended by one `release`.

        Raises: what a lane raised; BudgetExceeded when the units do not fit beside those already held.
        """
        staged = self._hold_ready(units)
        if staged is None:
            start_s = time.perf_counter()
            future = self._loop.submit(self._demand(units))
            try:
                staged = future.result()
            except BaseException:
                future.add_done_callback(lambda done: self._undo(units, done))
                raise
            finally:
                self._lanes.trace.add_wait(Wait(start_s, time.perf_counter(), units[0].name if units else ""))
        self.ask_prefetch()
        return staged

    def release(self, units: Sequence[Unit]) -> None:
        """End one hold of `units`; never blocks. Compute given so far may still run: an event stands behind it."""
        event = self._device.record()
        with self._lock:
            for unit in units:
                staged = self._staged[unit.index]
                staged.holds -= 1
                staged.last_use = event
        self._loop.call_soon(self._notify)

    def ask_prefetch(self) -> None:
        """Fetch what should be needed next, as far as there is room; never blocks."""
        if not self._prefetch_asked:
            self._prefetch_asked = True
            self._loop.call_soon(self._prefetch)

    def _hold_ready(self, units: Sequence[Unit]) -> list[Staged] | None:
        """Hold all of `units` if all are here, else none of them."""
        with self._lock:
            staged = [self._staged.get(unit.index) for unit in units]
            if any(one is None for one in staged):
                return None
            for unit in units:
                self._order.use(unit.index)
                self._staged[unit.index].holds += 1
        return [one for one in staged if one is not None]

    def _undo(self, units: Sequence[Unit], done: Future[list[Staged]]) -> None:
        """The waiting thread was interrupted: give back what the fetch may have held for it after all."""
        if not done.cancelled() and done.exception() is None:
            self.release(units)

    # -- the loop's side

    async def _demand(self, units: Sequence[Unit]) -> list[Staged]:
        held: list[Unit] = []
        try:
            for unit in units:
                await self._ensure(unit)
                held.append(unit)
        except BaseException:
            with self._lock:
                for unit in held:
                    self._staged[unit.index].holds -= 1
            self._notify()
            raise
        with self._lock:
            for unit in units:
                self._order.use(unit.index)
            return [self._staged[unit.index] for unit in units]

    async def _ensure(self, unit: Unit) -> None:
        """Stage `unit` and hold it."""
        while True:
            while unit.index in self._withdrawn:
                await self._when_changed()
            with self._lock:
                staged = self._staged.get(unit.index)
                if staged is not None:
                    staged.holds += 1
                    return
            task = self._fetching.get(unit.index)
            if task is None:
                nbytes = self._layouts[unit.index].staged_nbytes
                lease = None if self._rests_in_place(unit) else await self._make_room(unit, nbytes)
                if unit.index in self._fetching or unit.index in self._staged or unit.index in self._withdrawn:
                    if lease is not None:  # while this one waited for room, somebody else fetched or withdrew it
                        lease.release()
                    continue
                task = self._start_fetch(unit, lease, NEEDED_NOW)
            await asyncio.shield(task)

    async def make_room(self, nbytes: int, holder: str) -> Lease:
        """Lease `nbytes` of the staging pool, evicting units that nobody holds when there is no free room."""
        while True:
            changed = self._when_changed()
            freed = self._pool.freed()
            lease = self._pool.try_acquire(nbytes, holder)
            if lease is None and self._evict_one(keep=()):
                continue
            if lease is not None:
                changed.cancel()
                freed.cancel()
                return lease
            if not self._fetching and self._pool.statistics().leased_nbytes == self._held_nbytes():
                raise BudgetExceeded(
                    f"{holder} needs {nbytes} bytes of {self._pool.name}, but all {self._pool.capacity_nbytes} bytes "
                    f"are held "
                    f"by units in use ({', '.join(self._pool.statistics().holders)}); raise the budget by at least "
                    f"{nbytes} bytes"
                )
            await asyncio.wait([changed, freed], return_when=asyncio.FIRST_COMPLETED)
            changed.cancel()
            freed.cancel()

    async def _make_room(self, unit: Unit, nbytes: int) -> Lease:
        return await self.make_room(nbytes, f"{unit.name}/param")

    def _held_nbytes(self) -> int:
        with self._lock:
            return sum(s.lease.nbytes for s in self._staged.values() if s.lease is not None and s.holds)

    def _rests_in_place(self, unit: Unit) -> bool:
        return self._device.one_memory and self._resting[unit.index] is not None

    def _start_fetch(self, unit: Unit, lease: Lease | None, needed: int) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(self._fetch(unit, lease, needed))
        self._fetching[unit.index] = task
        return task

    async def _fetch(self, unit: Unit, lease: Lease | None, needed: int) -> None:
        """One unit's journey to the device: home -> (bounce buffer) -> slot. Owns `lease` until it is staged."""
        layout = self._layouts[unit.index]
        try:
            if lease is None:
                buffer = self._resting[unit.index]
                assert buffer is not None
            else:
                buffer = lease.buffer[: layout.staged_nbytes]
                await self._bring(unit, buffer, needed)
            with self._lock:
                self._staged[unit.index] = Staged(layout, buffer, lease)
        except BaseException:
            if lease is not None:
                lease.release()
            raise
        finally:
            del self._fetching[unit.index]
            self._notify()

    async def _bring(self, unit: Unit, slot: Tensor, needed: int) -> None:
        resting = self._resting[unit.index]
        if resting is not None:
            await self._upload(unit, slot, resting)
        elif self._device.one_memory:
            await self._read(unit, slot, needed)
        else:
            lease = await self._bounce.acquire(slot.numel(), f"{unit.name}/param on its way")
            try:
                await self._read(unit, lease.buffer, needed)
                await self._upload(unit, slot, lease.buffer[: slot.numel()])
            finally:
                lease.release()

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

    async def _upload(self, unit: Unit, slot: Tensor, source: Tensor) -> None:
        await self._lanes.h2d.run(
            self._device.upload, slot, source, None, unit=unit.name, kind="param", nbytes=source.numel()
        )

    def _prefetch(self) -> None:
        self._prefetch_asked = False
        wanted: list[int] = []
        for index in self._order.upcoming():
            if index in wanted:
                continue
            wanted.append(index)
            unit = self._layouts[index].unit
            if index in self._staged or index in self._fetching or index in self._withdrawn:
                continue
            lease = None
            if not self._rests_in_place(unit):
                lease = self._room_now(unit, wanted)
                if lease is None:
                    return
            task = self._start_fetch(unit, lease, NEEDED_SOON)
            task.add_done_callback(_look_at)

    def _room_now(self, unit: Unit, keep: Sequence[int]) -> Lease | None:
        """A lease for a prefetch, at most by evicting units that are needed later than all of `keep`."""
        nbytes = self._layouts[unit.index].staged_nbytes
        try:
            lease = self._pool.try_acquire(nbytes, f"{unit.name}/param")
            while lease is None and self._evict_one(keep):
                lease = self._pool.try_acquire(nbytes, f"{unit.name}/param")
        except BudgetExceeded:
            return None  # a hint may fail quietly; the fetch that needs the unit will raise
        return lease

    def _evict_one(self, keep: Sequence[int]) -> bool:
        """Evict the unheld unit that is needed last, none of `keep`. Returns whether one was evicted."""
        with self._lock:
            candidates = {
                index: staged
                for index, staged in self._staged.items()
                if not staged.holds and staged.lease is not None and index not in keep
            }
            if not candidates:
                return False
            distance = {index: position for position, index in reversed(list(enumerate(self._order.upcoming())))}
            victim = max(candidates, key=lambda index: distance.get(index, len(distance) + 1))
            staged = self._staged.pop(victim)
        self._let_go(staged)
        return True

    def _let_go(self, staged: Staged) -> None:
        """Give the slot back. Invariant: its last reader on compute has passed, else the next copy overtakes it."""
        if staged.last_use is not None:
            staged.last_use.synchronize()
        if staged.lease is not None:
            staged.lease.release()

    async def withdraw(self, units: Sequence[Unit]) -> None:
        """Evict `units` and let nobody fetch them until `admit`, because their values are about to change.

        Invariant: no fetch begins between the two. One that did would stage bytes of before, or half of each, and
        serve them to the next forward without a sign. Raises: as `evict`; nothing is withdrawn then.
        """
        self._withdrawn.update(unit.index for unit in units)
        try:
            await self.evict(units)
        except BaseException:
            self.admit(units)
            raise

    def admit(self, units: Sequence[Unit]) -> None:
        """The values are whole again. Called on the loop's thread."""
        self._withdrawn.difference_update(unit.index for unit in units)
        self._notify()

    async def evict(self, units: Sequence[Unit]) -> None:
        """Take `units` off the device. Waits for fetches on their way.

        Raises: RuntimeError if one of them is held.
        """
        for unit in units:
            while unit.index in self._fetching:
                await asyncio.wait([self._fetching[unit.index]])
            with self._lock:
                staged = self._staged.get(unit.index)
                if staged is None:
                    continue
                if staged.holds:
                    raise RuntimeError(
                        f"unit {unit.name!r} is in use by a forward or backward, so its values cannot change now: "
                        "finish or drop the backward first"
                    )
                del self._staged[unit.index]
            self._let_go(staged)
        self._notify()

    def _when_changed(self) -> asyncio.Future[None]:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._changed = [other for other in self._changed if not other.done()]
        self._changed.append(future)
        return future

    def _notify(self) -> None:
        changed, self._changed = self._changed, []
        for future in changed:
            if not future.done():
                future.set_result(None)


def _look_at(task: asyncio.Task[None]) -> None:
    """Retrieve a prefetch's exception: the fetch that needs the unit will meet the same failure and raise it."""
    if not task.cancelled():
        task.exception()
