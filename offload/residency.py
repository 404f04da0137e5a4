"""Which units' parameters are on the device, and who may use them: fetch, prefetch, update, hold, let go, evict."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future

from .journey import Journeys
from .layout import UnitLayout
from .order import UseOrder
from .scheduler.devices import Device
from .scheduler.fence import Fence
from .scheduler.loop import LoopThread
from .scheduler.pool import BudgetExceeded, Lease, Pool
from .scheduler.storage import NEEDED_LATER, NEEDED_NOW, NEEDED_SOON
from .scheduler.trace import Trace, Wait
from .staged import Staged
from .units import Unit
from .update import UnitUpdate
from .updates import Pending, PendingUpdates

MIN_UPDATE_WINDOW_NBYTES = 32 << 20


def update_window_nbytes(ring_nbytes: int) -> int:
    """How much the updates under way may stream through a ring of this size; see `Residency`."""
    return 2 * max(ring_nbytes, MIN_UPDATE_WINDOW_NBYTES)


class Residency:
    """Brings units to the device, up to date, and takes them away.

    Guarantees:
        A unit that is held is never evicted or overwritten.
        A unit is never handed out before its pending update has been made.
        A prefetch never waits for room: it takes what is free or can be evicted at once, so it cannot stand in the
        way of a fetch that somebody waits for.
        A fetch that somebody waits for waits only for leases whose owners make progress without it.

    Where a unit's parameters rest in host memory and the device shares it, the unit computes from where it rests.
    Between a step's decision and its own update, a unit that is still on the device is stale: its bytes may be updated
    where they are, or evicted, but nobody computes from them.

    Args:
        pool: where staged units are leased from: the device's slots, or host memory where they are one memory.
        update_window_nbytes: how much the updates under way may stream; with more, the one needed first would share
            the ring with many that are not.
    """

    def __init__(
        self,
        layouts: Sequence[UnitLayout],
        device: Device,
        loop: LoopThread,
        pool: Pool,
        order: UseOrder,
        journeys: Journeys,
        updates: PendingUpdates,
        update_window_nbytes: int,
        trace: Trace,
    ) -> None:
        self._layouts = layouts
        self._device = device
        self._loop = loop
        self._pool = pool
        self._order = order
        self._journeys = journeys
        self._updates = updates
        self._update_window_nbytes = update_window_nbytes
        self._trace = trace
        self._lock = threading.Lock()
        self._staged: dict[int, Staged] = {}
        self._stale: dict[int, Staged] = {}
        self._fetching: dict[int, asyncio.Task[None]] = {}
        self._updating_nbytes: dict[int, int] = {}
        self._early: deque[int] = deque()
        self._left_over: asyncio.Task[None] | None = None
        self._changed: list[asyncio.Future[None]] = []
        self._withdrawn: set[int] = set()
        self._demanded: Counter[int] = Counter()  # staged for somebody who has not come to hold them yet
        self._prefetch_asked = False
        self._rooms_wanted = 0
        journeys.on_stored = self._stored

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
                if self._updates.failure is not None:
                    self._updates.report()
                raise
            finally:
                self._trace.add_wait(Wait(start_s, time.perf_counter(), units[0].name if units else ""))
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
        if self._changed:  # who begins to wait after this looks at `holds` first
            self._loop.call_soon(self._notify)

    def expect(self, updates: Mapping[int, UnitUpdate], after: Future[bool] | None) -> dict[int, Future[None]]:
        """From here on these units (by index) are used only after their updates; never blocks.

        Args:
            after: what must be done before any of them begins (a commit), or None.

        Returns: for each unit, what is done when its update is stored, or broke off.
        """
        with self._lock:
            made = self._updates.add(updates, after)
            for index in updates:
                staged = self._staged.pop(index, None)
                if staged is not None:
                    self._stale[index] = staged
        self.ask_prefetch()
        return made

    def begin_early(self, unit: int, update: UnitUpdate, after: Future[bool] | None) -> Future[None] | None:
        """Make a unit's update as soon as there is room for it, in backward, behind what backward needs itself.

        Called on the loop. Returns: as `expect`; None if the unit is in use or has an update, and nothing was begun.
        """
        with self._lock:
            staged = self._staged.get(unit)
            if (staged is not None and staged.holds) or self._demanded[unit] or unit in self._updates:
                return None
            made = self._updates.add({unit: update}, after)[unit]
            if staged is not None:
                self._stale[unit] = self._staged.pop(unit)
        self._early.append(unit)
        self._run_early()
        return made

    def begin_left_over(self) -> None:
        """Make the updates of the last step that no forward has taken. Called on the loop, before any early update.

        Invariant: an early update waits for the last step's commit, which waits for these. If they waited for the
        next `step()`, whoever waits for an early update before that would wait for ever.
        """
        units = [self._layouts[index].unit for index in self._updates.units()]
        if units:
            self._left_over = asyncio.get_running_loop().create_task(self.settled(units))
            self._left_over.add_done_callback(_look_at)

    async def make_pending(self, unit: Unit, made: Future[None]) -> None:
        """Return when `made` is done, of the unit's last decided update; begin that update if nobody has.

        Unlike `settled` this never waits for an update that is decided later.
        """
        while not made.done():
            changed = self._when_changed()
            if unit.index in self._updates and unit.index not in self._fetching:
                old = self._take_stale(unit.index)
                in_passing = old is None and not self._journeys.rests_in_place(unit.index)
                self._start_fetch(unit, old.lease if old else None, NEEDED_LATER, old, in_passing)
            await changed

    def call_off(self, units: Sequence[Unit]) -> list[Unit]:
        """Drop the updates of `units` that have not begun. Called on the loop. Returns the units whose update has."""
        begun = []
        for unit in units:
            pending = self._updates.take(unit.index)
            if pending is None:
                begun.append(unit)
                continue
            pending.made.cancel()
            with self._lock:
                staged = self._stale.pop(unit.index, None)
                if staged is not None:
                    self._staged[unit.index] = staged
        return begun

    def end_early(self) -> None:
        """Backward is over: what has not begun is made in the order of the next uses. Never blocks."""
        self._loop.call_soon(self._early.clear)

    def settle(self, units: Sequence[Unit] | None = None) -> None:
        """Make and store the pending updates of `units` (all by default); blocks. Raises what a lane raised."""
        try:
            self._loop.run(self.settled([layout.unit for layout in self._layouts] if units is None else units))
        except BaseException:
            if self._updates.failure is not None:
                self._updates.report()
            raise

    def ask_prefetch(self) -> None:
        """Fetch what should be needed next, as far as there is room; never blocks."""
        if not self._prefetch_asked and len(self._staged) < len(self._layouts):
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
        self._demanded.update(unit.index for unit in units)
        try:
            for unit in units:
                await self._ensure(unit)
                held.append(unit)
        except BaseException:
            with self._lock:
                for unit in held:
                    self._staged[unit.index].holds -= 1
            raise
        finally:
            self._demanded.subtract(unit.index for unit in units)
            self._notify()
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
                old = self._take_stale(unit.index)
                lease = old.lease if old is not None else None
                if lease is None and not self._journeys.rests_in_place(unit.index):
                    lease = await self._make_room(unit, self._layouts[unit.index].staged_nbytes)
                    if self._is_known(unit.index) or unit.index in self._withdrawn:
                        lease.release()  # while this one waited for room, somebody else fetched or withdrew it
                        continue
                task = self._start_fetch(unit, lease, NEEDED_NOW, old)
            await asyncio.shield(task)

    def _is_known(self, unit: int) -> bool:
        return unit in self._fetching or unit in self._staged or unit in self._stale

    def _take_stale(self, unit: int) -> Staged | None:
        """The unit's stale copy, to be updated where it is."""
        with self._lock:
            return self._stale.pop(unit, None)

    async def settled(self, units: Sequence[Unit]) -> None:
        """Return when none of `units` has an update pending or still being stored."""
        for unit in units:
            while unit.index in self._fetching or unit.index in self._updates:
                task = self._fetching.get(unit.index)
                if task is None:
                    old = self._take_stale(unit.index)
                    in_passing = old is None and not self._journeys.rests_in_place(unit.index)
                    task = self._start_fetch(unit, old.lease if old else None, NEEDED_NOW, old, in_passing)
                await asyncio.wait([task])
                if self._updates.failure is not None:
                    raise self._updates.failure
            await self._journeys.stored(unit.index)

    async def make_room(self, nbytes: int, holder: str) -> Lease:
        """Lease `nbytes` of the staging pool, evicting units that nobody holds when there is no free room.

        In one memory the buffer may be written at once; on a device of its own a copy into it waits for its fence.
        """
        self._rooms_wanted += 1
        try:
            lease = await self._find_room(nbytes, holder)
            if self._device.one_memory:
                try:
                    await self._journeys.passed(lease.fence, holder)
                except BaseException:
                    lease.release()
                    raise
            return lease
        finally:
            self._rooms_wanted -= 1
            self.ask_prefetch()

    async def _find_room(self, nbytes: int, holder: str) -> Lease:
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
                    f"are held by units in use ({', '.join(self._pool.statistics().holders)}); raise the budget by "
                    f"at least {nbytes} bytes"
                )
            await asyncio.wait([changed, freed], return_when=asyncio.FIRST_COMPLETED)
            changed.cancel()
            freed.cancel()

    async def _make_room(self, unit: Unit, nbytes: int) -> Lease:
        return await self.make_room(nbytes, f"{unit.name}/param")

    def _held_nbytes(self) -> int:
        with self._lock:
            return sum(s.lease.nbytes for s in self._staged.values() if s.lease is not None and s.holds)

    def _start_fetch(
        self, unit: Unit, lease: Lease | None, needed: int, old: Staged | None = None, in_passing: bool = False
    ) -> asyncio.Task[None]:
        """Move the unit, or with `in_passing` only make its update. Owns `lease` from here on, and `old`'s."""
        pending = self._updates.take(unit.index)
        if pending is not None:
            self._updating_nbytes[unit.index] = self._journeys.update_nbytes(unit.index)
        if in_passing:
            work = self._update_in_passing(unit, needed, pending)
        else:
            work = self._fetch(unit, lease, needed, pending, old)
        task = asyncio.get_running_loop().create_task(work)
        self._fetching[unit.index] = task
        task.add_done_callback(_look_at)
        return task

    async def _update_in_passing(self, unit: Unit, needed: int, pending: Pending | None) -> None:
        try:
            if pending is not None:
                await self._journeys.update_in_passing(unit, needed, pending)
        finally:
            self._ended(unit)
        self._go_on()

    async def _fetch(
        self, unit: Unit, lease: Lease | None, needed: int, pending: Pending | None, old: Staged | None
    ) -> None:
        layout = self._layouts[unit.index]
        fence: Fence | None = old.last_use if old is not None else None
        if fence is None and lease is not None:
            fence = lease.fence
        try:
            slot = None if lease is None else lease.buffer[: layout.staged_nbytes]
            buffer = await self._journeys.fetch(unit, slot, needed, pending, old is not None, fence)
            with self._lock:
                staged = Staged(layout, buffer, lease)
                if unit.index in self._updates:  # decided while this was on its way
                    self._stale[unit.index] = staged
                else:
                    self._staged[unit.index] = staged
        except BaseException:
            if lease is not None:
                lease.release(after=fence)
            raise
        finally:
            self._ended(unit)
        self._go_on()  # not behind a failure: it would try again, and again

    def _ended(self, unit: Unit) -> None:
        del self._fetching[unit.index]
        self._updating_nbytes.pop(unit.index, None)
        self._notify()

    def _stored(self) -> None:
        self._notify()
        self._go_on()

    def _go_on(self) -> None:
        self._prefetch()
        self._run_early()

    def _prefetch(self) -> None:
        self._prefetch_asked = False
        wanted: list[int] = []
        for index in self._order.upcoming():
            if index in wanted:
                continue
            wanted.append(index)
            if index in self._staged or index in self._fetching or index in self._withdrawn:
                continue
            unit = self._layouts[index].unit
            if index in self._updates and not self._may_update(index):
                return
            old, lease = self._take_stale(index), None
            if old is not None:
                lease = old.lease
            elif not self._journeys.rests_in_place(index):
                lease = self._room_now(unit, wanted)
                if lease is None:
                    return
            self._start_fetch(unit, lease, NEEDED_SOON, old)

    def _run_early(self) -> None:
        """Begin early updates in the order in which backward made their gradients, as far as there is room."""
        while self._early and self._early[0] not in self._fetching and self._may_update(self._early[0]):
            index = self._early.popleft()
            if index not in self._updates or index in self._withdrawn:
                continue
            old = self._take_stale(index)
            if old is not None and old.lease is not None and not self._may_stay(old):
                self._let_go(old)
                old = None
            in_passing = old is None and not self._journeys.rests_in_place(index)
            self._start_fetch(
                self._layouts[index].unit, old.lease if old is not None else None, NEEDED_LATER, old, in_passing
            )

    def _may_stay(self, old: Staged) -> bool:
        """Whether a unit may keep its room for the length of an early update, while backward needs room for others."""
        assert old.lease is not None
        return self._device.one_memory and self._pool.capacity_nbytes >= 3 * old.lease.nbytes

    def _may_update(self, unit: int) -> bool:
        """Whether one more update fits beside those under way; what is needed first must not share with too many."""
        if not self._updating_nbytes:
            return True
        return sum(self._updating_nbytes.values()) + self._journeys.update_nbytes(unit) <= self._update_window_nbytes

    def _room_now(self, unit: Unit, keep: Sequence[int]) -> Lease | None:
        """A lease for a prefetch, at most by evicting units that are needed later than all of `keep`."""
        if self._rooms_wanted:
            return None  # else prefetches would take in turn what is evicted for somebody who waits for more of it
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
                for copies in (self._staged, self._stale)
                for index, staged in copies.items()
                if not staged.holds
                and staged.lease is not None
                and index not in keep
                and not self._demanded[index]
                and not self._journeys.is_storing(index)
            }
            if not candidates:
                return False
            distance = {index: position for position, index in reversed(list(enumerate(self._order.upcoming())))}
            victim = max(candidates, key=lambda index: distance.get(index, len(distance) + 1))
            for copies in (self._staged, self._stale):
                copies.pop(victim, None)
        self._let_go(candidates[victim])
        return True

    def _let_go(self, staged: Staged) -> None:
        """Give the slot back. Invariant: the next copy into it waits for its last reader on compute, else it overtakes
        it; the event travels with the slot."""
        if staged.lease is not None:
            staged.lease.release(after=staged.last_use)

    async def withdraw(self, units: Sequence[Unit]) -> None:
        """Evict `units` and let nobody fetch them until `admit`, because their values are about to be written.

        Invariant: no fetch begins between the two. One that did would stage bytes of before, or half of each, and
        serve them to the next forward without a sign. Invariant: no update of theirs is pending or being stored, else
        it would be made from what is written now. Raises: as `evict`; nothing is withdrawn then.
        """
        await self.settled(units)
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
            if staged.lease is None:
                await self._journeys.passed(staged.last_use, unit.name)  # it computed from where it rests
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
