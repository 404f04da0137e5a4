"""Leases: a byte budget that is never exceeded, buffers that have one owner, waiting that ends."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch
from torch import Tensor

from offload.scheduler.hostmem import allocate_pages
from offload.scheduler.pool import PAGE_NBYTES, BudgetExceeded, Lease, Pool, page_ceil


class Memory:
    """Counts what a pool allocates and frees."""

    def __init__(self) -> None:
        self.allocated: list[int] = []
        self.freed: list[int] = []

    def allocate(self, nbytes: int) -> Tensor:
        self.allocated.append(nbytes)
        return allocate_pages(nbytes)

    def free(self, buffer: Tensor) -> None:
        self.freed.append(buffer.numel())

    @property
    def live_nbytes(self) -> int:
        return sum(self.allocated) - sum(self.freed)


@pytest.fixture
def memory() -> Memory:
    return Memory()


def pool_of(memory: Memory, pages: int) -> Pool:
    return Pool("test memory", pages * PAGE_NBYTES, memory.allocate, memory.free)


def take(pool: Pool, pages: int, holder: str = "somebody") -> Lease:
    lease = pool.try_acquire(pages * PAGE_NBYTES, holder)
    assert lease is not None
    return lease


@pytest.mark.parametrize(("nbytes", "pages"), [(0, 0), (1, 1), (4095, 1), (4096, 1), (4097, 2)])
def test_page_ceil(nbytes: int, pages: int) -> None:
    assert page_ceil(nbytes) == pages * PAGE_NBYTES


def test_leases_are_whole_pages_and_aligned(memory: Memory) -> None:
    pool = pool_of(memory, 4)
    lease = pool.try_acquire(5000, "unit/param")
    assert lease is not None
    assert lease.nbytes == lease.buffer.numel() == 8192
    assert lease.buffer.data_ptr() % PAGE_NBYTES == 0
    assert lease.buffer.dtype == torch.uint8


def test_budget_is_never_exceeded(memory: Memory) -> None:
    pool = pool_of(memory, 4)
    leases = [take(pool, 2), take(pool, 2)]
    assert pool.try_acquire(1, "late") is None
    leases.pop().release()
    assert take(pool, 1) and take(pool, 1)
    assert pool.try_acquire(1, "late") is None
    assert memory.live_nbytes <= 4 * PAGE_NBYTES
    assert pool.statistics().peak_nbytes == 4 * PAGE_NBYTES


def test_warm_buffers_count_and_make_room(memory: Memory) -> None:
    """Two free pages of another size must be dropped before three new ones are allocated under a budget of four."""
    pool = pool_of(memory, 4)
    first, second = take(pool, 1), take(pool, 1)
    first.release()
    second.release()
    assert pool.statistics().warm_nbytes == 2 * PAGE_NBYTES
    take(pool, 3)
    assert memory.live_nbytes == 4 * PAGE_NBYTES
    assert pool.statistics().warm_nbytes == PAGE_NBYTES


def test_same_size_is_reused_without_allocating(memory: Memory) -> None:
    pool = pool_of(memory, 4)
    for _ in range(10):
        lease = take(pool, 2)
        address = lease.buffer.data_ptr()
        lease.release()
        again = take(pool, 2)
        assert again.buffer.data_ptr() == address
        again.release()
    assert memory.allocated == [2 * PAGE_NBYTES]


def test_asking_for_more_than_everything_names_the_numbers(memory: Memory) -> None:
    pool = pool_of(memory, 2)
    with pytest.raises(
        BudgetExceeded, match=r"unit/param needs 12288 bytes of test memory, whose whole budget is 8192 bytes"
    ):
        pool.try_acquire(2 * PAGE_NBYTES + 1, "unit/param")
    assert memory.allocated == []
    assert take(pool, 2)


def test_double_release_raises(memory: Memory) -> None:
    pool = pool_of(memory, 2)
    lease = take(pool, 1, "unit/grad")
    lease.release()
    assert lease.released
    with pytest.raises(RuntimeError, match=r"unit/grad released twice"):
        lease.release()
    assert pool.statistics().leased_nbytes == 0
    assert pool.statistics().warm_nbytes == PAGE_NBYTES


def test_failed_allocation_gives_the_bytes_back() -> None:
    fails = True

    def allocate(nbytes: int) -> Tensor:
        if fails:
            raise MemoryError("no pages")
        return allocate_pages(nbytes)

    pool = Pool("test memory", 2 * PAGE_NBYTES, allocate)
    with pytest.raises(MemoryError):
        pool.try_acquire(2 * PAGE_NBYTES, "unlucky")
    fails = False
    assert pool.statistics().leased_nbytes == 0
    assert pool.statistics().holders == ()
    assert take(pool, 2)


def test_returned_buffers_are_poisoned() -> None:
    pool = Pool("test memory", PAGE_NBYTES, allocate_pages, poison=lambda buffer: buffer.fill_(0xFF))
    lease = take(pool, 1)
    lease.buffer.zero_()
    buffer = lease.buffer
    lease.release()
    assert (buffer == 0xFF).all()
    assert buffer.view(torch.float32).isnan().all() and buffer.view(torch.bfloat16).isnan().all()


class Late:
    """A fence that passes when the test says so; notes what a buffer held when somebody waited for it."""

    def __init__(self) -> None:
        self.has_run = False
        self.num_waits = 0

    def has_passed(self) -> bool:
        return self.has_run

    def synchronize(self) -> None:
        self.num_waits += 1
        self.has_run = True


def test_a_fence_goes_with_the_buffer_until_it_has_passed(memory: Memory) -> None:
    pool, fence = pool_of(memory, 1), Late()
    lease = take(pool, 1)
    assert lease.fence is None
    lease.release(after=fence)
    lease = take(pool, 1)
    assert lease.fence is fence and fence.num_waits == 0, "neither giving back nor taking may block"
    lease.release()  # whoever gives it back unused has not waited either
    lease = take(pool, 1)
    assert lease.fence is fence
    lease.release()
    fence.has_run = True
    assert take(pool, 1).fence is None


def test_a_dropped_buffer_waits_for_its_fence(memory: Memory) -> None:
    fence, order = Late(), []
    pool = Pool("m", PAGE_NBYTES, allocate_pages, lambda buffer: order.append(fence.num_waits))
    take(pool, 1).release(after=fence)
    pool.close()
    assert order == [1], "memory was freed under a kernel that uses it"


def test_a_new_buffer_waits_for_what_its_allocator_had_it_for(memory: Memory) -> None:
    fence = Late()
    pool = Pool("m", PAGE_NBYTES, memory.allocate, record=lambda: fence)
    lease = take(pool, 1)
    assert lease.fence is fence
    fence.has_run = True
    lease.release()
    assert take(pool, 1).fence is None


def test_poison_waits_for_the_fence() -> None:
    pool, fence = Pool("m", PAGE_NBYTES, allocate_pages, poison=lambda buffer: buffer.fill_(0xFF)), Late()
    lease = take(pool, 1)
    buffer = lease.buffer.fill_(1)
    lease.release(after=fence)
    assert (buffer == 1).all(), "compute behind the fence still reads this"
    lease = take(pool, 1)
    assert lease.fence is not None and not lease.fence.has_passed()
    lease.fence.synchronize()
    assert fence.num_waits == 1 and (buffer == 0xFF).all()
    buffer.fill_(2)
    lease.fence.synchronize()
    assert (buffer == 2).all(), "poisoned once, before the next owner writes"


def test_holders_are_named(memory: Memory) -> None:
    pool = pool_of(memory, 4)
    leases = [take(pool, 1, "b"), take(pool, 1, "a"), take(pool, 1, "a")]
    assert pool.statistics().holders == ("a", "b")
    leases[2].release()
    assert pool.statistics().holders == ("a", "b")
    leases[0].release()
    assert pool.statistics().holders == ("a",)


def test_waiter_wakes_when_a_lease_comes_back(memory: Memory) -> None:
    pool = pool_of(memory, 2)
    order: list[str] = []

    async def wait(name: str, pages: int) -> None:
        lease = await pool.acquire(pages * PAGE_NBYTES, name)
        order.append(name)
        await asyncio.sleep(0)
        lease.release()

    async def main() -> None:
        held = take(pool, 2)
        waiters = [asyncio.create_task(wait(f"waiter {i}", 1 + i % 2)) for i in range(6)]
        await asyncio.sleep(0)
        assert order == []
        threading.Thread(target=held.release).start()  # leases come back from any thread
        await asyncio.wait_for(asyncio.gather(*waiters), 20)

    asyncio.run(main())
    assert sorted(order) == [f"waiter {i}" for i in range(6)]
    assert pool.statistics().leased_nbytes == 0


def test_cancelled_waiter_takes_nothing(memory: Memory) -> None:
    pool = pool_of(memory, 1)

    async def main() -> None:
        held = take(pool, 1)
        waiter = asyncio.create_task(pool.acquire(1, "gives up"))
        await asyncio.sleep(0)
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter
        held.release()
        lease = await asyncio.wait_for(pool.acquire(1, "patient"), 20)
        assert pool.statistics().holders == ("patient",)
        lease.release()

    asyncio.run(main())


def test_many_threads_never_share_a_buffer() -> None:
    """Each owner writes its name over its buffer and must still find it there."""
    pool = Pool("test memory", 3 * PAGE_NBYTES, allocate_pages)
    failures: list[str] = []
    start = threading.Barrier(4)

    def work(name: int) -> None:
        start.wait()
        for _ in range(300):
            lease = pool.try_acquire(PAGE_NBYTES, str(name))
            if lease is None:
                continue
            lease.buffer.fill_(name)
            if not bool((lease.buffer == name).all()):
                failures.append(f"{name} lost its buffer")
            if pool.statistics().leased_nbytes > 3 * PAGE_NBYTES:
                failures.append("over budget")
            lease.release()

    threads = [threading.Thread(target=work, args=(name,)) for name in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    assert pool.statistics().leased_nbytes == 0
    assert pool.statistics().peak_nbytes <= 3 * PAGE_NBYTES


def test_close_drops_warm_buffers(memory: Memory) -> None:
    pool = pool_of(memory, 4)
    take(pool, 2).release()
    held = take(pool, 1)
    pool.close()
    assert memory.live_nbytes == PAGE_NBYTES
    held.release()


def test_a_long_line_is_woken_one_by_one(memory: Memory) -> None:
    """Waking everybody at every release is what made a ring with hundreds of chunks in line burn its loop."""
    asked = 0

    class Counting(Pool):
        def try_acquire(self, nbytes: int, holder: str) -> Lease | None:
            nonlocal asked
            asked += 1
            return super().try_acquire(nbytes, holder)

    pool = Counting("test memory", 2 * PAGE_NBYTES, memory.allocate)
    served: list[int] = []

    async def chunk(number: int) -> None:
        lease = await pool.acquire(PAGE_NBYTES, "chunk")
        served.append(number)
        await asyncio.sleep(0)
        lease.release()

    async def everybody() -> None:
        await asyncio.gather(*(chunk(number) for number in range(200)))

    asyncio.run(everybody())
    assert served == list(range(200)), "first come, first served"
    assert asked <= 4 * 200
    assert pool.statistics().leased_nbytes == 0


def test_a_turn_that_nobody_takes_goes_to_the_next_in_line(memory: Memory) -> None:
    pool = pool_of(memory, 1)

    async def scenario() -> None:
        held = take(pool, 1)
        first = asyncio.create_task(pool.acquire(1, "first"))
        second = asyncio.create_task(pool.acquire(1, "second"))
        await asyncio.sleep(0)
        held.release()  # it is the first one's turn
        await asyncio.sleep(0)
        first.cancel()
        lease = await asyncio.wait_for(second, 5)
        lease.release()
        assert first.cancelled()

    asyncio.run(scenario())


def test_whoever_lost_its_turn_to_a_passer_by_keeps_its_place(memory: Memory) -> None:
    pool = pool_of(memory, 1)
    order: list[str] = []

    async def waits(name: str) -> None:
        lease = await pool.acquire(1, name)
        order.append(name)
        lease.release()

    async def scenario() -> None:
        held = take(pool, 1)
        tasks = [asyncio.create_task(waits("first")), asyncio.create_task(waits("second"))]
        await asyncio.sleep(0)
        held.release()
        passer_by = take(pool, 1)  # before the first one runs
        await asyncio.sleep(0.01)
        assert order == []
        passer_by.release()
        await asyncio.gather(*tasks)

    asyncio.run(scenario())
    assert order == ["first", "second"]
