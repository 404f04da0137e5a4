"""Leases: the right to use a buffer, taken whole from a pool under a byte budget, given back once."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from .fence import Fence

PAGE_NBYTES = 4096


def page_ceil(nbytes: int) -> int:
    """`nbytes` rounded up to whole pages, the unit of direct I/O and of accounting."""
    return -(-nbytes // PAGE_NBYTES) * PAGE_NBYTES


class BudgetExceeded(MemoryError):
    """A pool was asked for more than its whole budget can ever give."""


class Lease:
    """The right to use `buffer` (uint8 [nbytes], page-aligned on the host) until `release()`.

    `fence` is what the first write into the buffer waits for, or None: compute of the owner before may still use it.
    Releasing twice raises: a second release would hand one buffer to two owners.
    """

    __slots__ = ("_pool", "buffer", "fence", "holder", "nbytes")

    def __init__(self, pool: Pool, buffer: Tensor, holder: str, fence: Fence | None = None) -> None:
        self._pool: Pool | None = pool
        self.buffer = buffer
        self.fence = fence
        self.nbytes = buffer.numel()
        self.holder = holder

    @property
    def released(self) -> bool:
        return self._pool is None

    def release(self, after: Fence | None = None) -> None:
        """Give the buffer back; never blocks. The caller vouches that no transfer still uses it, and no kernel behind
        `after`, for which the next owner waits. Without it the lease's own fence stands."""
        pool, self._pool = self._pool, None
        if pool is None:
            raise RuntimeError(f"lease of {self.holder} released twice; a lease is given back exactly once")
        pool._take_back(self, self.fence if after is None else after)


class _PoisonBehind:
    """A fence that poisons the buffer once what it stands for has passed: who may write it still reads nothing old."""

    def __init__(self, fence: Fence, poison: Callable[[Tensor], None], buffer: Tensor) -> None:
        self._fence = fence
        self._poison = poison
        self._buffer = buffer
        self._lock = threading.Lock()
        self._poisoned = False

    def has_passed(self) -> bool:
        return self._poisoned

    def synchronize(self) -> None:
        self._fence.synchronize()
        with self._lock:
            if not self._poisoned:
                self._poison(self._buffer)
                self._poisoned = True


class _Waiter(NamedTuple):
    """Somebody in line for `nbytes`, to be told in `loop` by `turn`."""

    nbytes: int
    loop: asyncio.AbstractEventLoop
    turn: asyncio.Future[None]


class _Warm(NamedTuple):
    """A free buffer, and what the next write into it must wait for."""

    buffer: Tensor
    fence: Fence | None


def _ahead(fence: Fence | None) -> Fence | None:
    """The fence, unless it has passed: then nobody need wait for it."""
    return None if fence is None or fence.has_passed() else fence


@dataclass(frozen=True, kw_only=True)
class PoolStatistics:
    """A frozen snapshot of a pool, in bytes."""

    capacity_nbytes: int
    leased_nbytes: int
    warm_nbytes: int
    peak_nbytes: int
    holders: tuple[str, ...]


class Pool:
    """Buffers of exactly the asked size under one byte budget.

    Free buffers stay warm by size and are handed out again; they are dropped only when a lease of another size
    needs their bytes. The address space does what a compacting allocator would: the budget cannot fragment. Warm
    buffers keep their fence; one that is dropped waits for it first.

    Args:
        name: for messages.
        capacity_nbytes: leased and warm buffers together never exceed it.
        allocate: makes an uninitialised uint8 buffer of the given size.
        free: called with a buffer before it is dropped for good, or None.
        poison: called with every buffer that comes back (the fake device fills it with NaN), or None.
        record: makes the fence of a buffer that was just allocated, or None where a new one is nobody else's: a
            device's allocator hands out again what kernels that are still under way use.
    """

    def __init__(
        self,
        name: str,
        capacity_nbytes: int,
        allocate: Callable[[int], Tensor],
        free: Callable[[Tensor], None] | None = None,
        poison: Callable[[Tensor], None] | None = None,
        record: Callable[[], Fence] | None = None,
    ) -> None:
        self.name = name
        self.capacity_nbytes = capacity_nbytes
        self._allocate = allocate
        self._free = free
        self._poison = poison
        self._record = record
        self._lock = threading.Lock()
        self._warm: dict[int, list[_Warm]] = {}
        self._warm_nbytes = 0
        self._leased_nbytes = 0
        self._peak_nbytes = 0
        self._holders: Counter[str] = Counter()
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []
        self._line: deque[_Waiter] = deque()

    def try_acquire(self, nbytes: int, holder: str) -> Lease | None:
        """A lease if the bytes are free now, else None. Never waits.

        Raises: BudgetExceeded if `nbytes` is more than the pool's whole capacity.
        """
        nbytes = page_ceil(nbytes)
        if nbytes > self.capacity_nbytes:
            raise BudgetExceeded(
                f"{holder} needs {nbytes} bytes of {self.name}, whose whole budget is {self.capacity_nbytes} bytes; "
                f"raise the budget to at least {nbytes} bytes"
            )
        with self._lock:
            if self._leased_nbytes + nbytes > self.capacity_nbytes:
                return None
            self._leased_nbytes += nbytes
            self._holders[holder] += 1
            same_size = self._warm.get(nbytes)
            warm = same_size.pop() if same_size else None
            dropped: list[_Warm] = []
            if warm is not None:
                self._warm_nbytes -= nbytes
            else:
                dropped = self._take_warm(self._leased_nbytes + self._warm_nbytes - self.capacity_nbytes)
            self._peak_nbytes = max(self._peak_nbytes, self._leased_nbytes + self._warm_nbytes)
        if warm is None:
            try:
                self._drop(dropped)
                dropped.clear()  # their memory is free before more is asked for
                buffer = self._allocate(nbytes)
                warm = _Warm(buffer, _ahead(self._record() if self._record is not None else None))
            except BaseException:
                with self._lock:
                    self._forget(nbytes, holder)
                self._wake_waiters()
                raise
        return Lease(self, warm.buffer, holder, _ahead(warm.fence))

    async def acquire(self, nbytes: int, holder: str) -> Lease:
        """A lease, waiting in line on the loop until the bytes are free. Hold no other lease of this pool meanwhile."""
        lease = self.try_acquire(nbytes, holder)
        in_front = False
        while lease is None:
            turn = self._stand_in_line(page_ceil(nbytes), in_front)
            lease = self.try_acquire(nbytes, holder)  # bytes may have come back before this one stood in line
            if lease is not None:
                turn.cancel()
                break
            try:
                await turn
            except asyncio.CancelledError:
                self._wake_waiters()  # its turn may have come: the next in line would never hear of these bytes
                raise
            lease = self.try_acquire(nbytes, holder)
            in_front = True  # whoever took its turn away did not stand in line
        return lease

    def _stand_in_line(self, nbytes: int, in_front: bool) -> asyncio.Future[None]:
        """A future of the running loop that is done once `nbytes` are free and nobody is before this one."""
        loop = asyncio.get_running_loop()
        waiter = _Waiter(nbytes, loop, loop.create_future())
        with self._lock:
            if in_front:
                self._line.appendleft(waiter)
            else:
                self._line.append(waiter)
        return waiter.turn

    def freed(self) -> asyncio.Future[None]:
        """A future of the running loop that is done once any lease has come back after this call."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        with self._lock:
            self._waiters = [pair for pair in self._waiters if not pair[1].done()]
            self._waiters.append((loop, future))
        return future

    def _take_back(self, lease: Lease, fence: Fence | None) -> None:
        fence = _ahead(fence)
        if self._poison is not None:
            if fence is None:
                self._poison(lease.buffer)
            else:
                fence = _PoisonBehind(fence, self._poison, lease.buffer)
        with self._lock:
            self._forget(lease.nbytes, lease.holder)
            self._warm.setdefault(lease.nbytes, []).append(_Warm(lease.buffer, fence))
            self._warm_nbytes += lease.nbytes
        self._wake_waiters()

    def _forget(self, nbytes: int, holder: str) -> None:
        """Count a lease as over. Called under the lock."""
        self._leased_nbytes -= nbytes
        self._holders[holder] -= 1
        if not self._holders[holder]:
            del self._holders[holder]

    def _wake_waiters(self) -> None:
        """Tell who watches, and as many in line as there are bytes for: waking all is work of its length squared."""
        with self._lock:
            waiters, self._waiters = self._waiters, []
            free_nbytes = self.capacity_nbytes - self._leased_nbytes
            while self._line and (self._line[0].turn.done() or self._line[0].nbytes <= free_nbytes):
                nbytes, loop, turn = self._line.popleft()
                if not turn.done():
                    free_nbytes -= nbytes
                    waiters.append((loop, turn))
        for loop, future in waiters:
            loop.call_soon_threadsafe(_wake, future)

    def _take_warm(self, excess_nbytes: int) -> list[_Warm]:
        """Warm buffers of at least `excess_nbytes`, largest first, that no longer count. Called under the lock."""
        taken = []
        for nbytes in sorted(self._warm, reverse=True):
            buffers = self._warm[nbytes]
            while buffers and excess_nbytes > 0:
                taken.append(buffers.pop())
                self._warm_nbytes -= nbytes
                excess_nbytes -= nbytes
        return taken

    def _drop(self, dropped: list[_Warm]) -> None:
        """Give memory back for good. Invariant: no kernel uses it any more, else the next owner's bytes are its."""
        for buffer, fence in dropped:
            if fence is not None:
                fence.synchronize()
            if self._free is not None:
                self._free(buffer)

    def close(self) -> None:
        """Drop the warm buffers. Leases still out keep theirs until they are garbage."""
        with self._lock:
            dropped = self._take_warm(self._warm_nbytes)
        self._drop(dropped)

    def statistics(self) -> PoolStatistics:
        with self._lock:
            return PoolStatistics(
                capacity_nbytes=self.capacity_nbytes,
                leased_nbytes=self._leased_nbytes,
                warm_nbytes=self._warm_nbytes,
                peak_nbytes=self._peak_nbytes,
                holders=tuple(sorted(self._holders)),
            )


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
