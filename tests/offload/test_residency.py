"""Who may stay on the device: holds, eviction, waiting for the last reader, and giving everything back."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offload import AdamW, OffloadConfig, OffloadEngine
from offload.assembly import Assembly, assemble
from offload.homes import ChunkStream
from offload.journey import Journeys
from offload.order import UseOrder
from offload.residency import Residency
from offload.scheduler.devices import Event, FakeDevice, HostEvent, OneMemoryDevice
from offload.scheduler.loop import LoopThread
from offload.scheduler.pool import BudgetExceeded, Pool
from offload.units import Unit
from offload.update import UnitUpdate
from offload.updates import PendingUpdates

PATIENCE_S = 20
UNIT_NBYTES = 8192  # Linear(16, 16) in fp32: 272 elements, filled up to 2048


class Latch:
    """An event of compute that passes when the test says so."""

    def __init__(self) -> None:
        self.passed, self.waited_for = threading.Event(), threading.Event()

    def has_passed(self) -> bool:
        return self.passed.is_set()

    def synchronize(self) -> None:
        self.waited_for.set()
        assert self.passed.wait(PATIENCE_S)

    def time_s(self) -> float:
        return 0.0


class LateReader(Latch):
    """Compute that runs after its unit was released, in the order of a stream: it must still find the unit's bytes."""

    def __init__(self, stream: ThreadPoolExecutor, buffer: Tensor, value: int, delay_s: float) -> None:
        super().__init__()

        def read() -> bool:
            time.sleep(delay_s)
            found_all = bool((buffer == value).all())
            self.passed.set()
            return found_all

        self.found_all = stream.submit(read)


class LatchedDevice(FakeDevice):
    """A fake device whose next recorded event can be chosen, and which counts uploads."""

    def __init__(self) -> None:
        super().__init__(max_delay_s=1e-4)
        self.next_event: Event | None = None
        self._training_thread = threading.current_thread()
        self.num_uploads = 0
        self.gate: threading.Event | None = None

    def record(self) -> Event:
        if threading.current_thread() is not self._training_thread:
            return HostEvent()  # behind an allocation
        event, self.next_event = self.next_event, None
        return event or HostEvent()

    def upload(self, device_buffer: Tensor, host_buffer: Tensor, after: Event | None) -> None:
        self.num_uploads += 1
        if self.gate is not None:
            assert self.gate.wait(PATIENCE_S)
        super().upload(device_buffer, host_buffer, after)


class Rig:
    """A residency over four units of equal size whose bytes are 1, 2, 3, 4, and a device for `slots` of them."""

    def __init__(self, slots: int, expected_order: list[int]) -> None:
        self.device = LatchedDevice()
        config = OffloadConfig(device=self.device, device_memory=slots * UNIT_NBYTES, dtype=torch.float32)
        model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))
        self.parts: Assembly = assemble(model, AdamW(), config)
        self.units: list[Unit] = [layout.unit for layout in self.parts.layouts]
        assert [layout.staged_nbytes for layout in self.parts.layouts] == [UNIT_NBYTES] * 4
        for index, resting in enumerate(self.parts.resting):
            assert resting is not None
            resting.fill_(index + 1)
        self.loop = LoopThread()
        parts = self.parts
        self.order = UseOrder({"train": expected_order})
        self.updates = PendingUpdates()
        self.stream = ChunkStream(parts.ring, parts.lanes)
        journeys = Journeys(
            parts.layouts, parts.homes, parts.resting, parts.device, parts.lanes, parts.stage, self.stream, self.updates
        )
        self.residency = Residency(
            parts.layouts, parts.device, self.loop, parts.slots, self.order, journeys, self.updates, 1 << 20,
            parts.lanes.trace,
        )  # fmt: skip

    def acquire(self, index: int) -> Tensor:
        (staged,) = self.residency.acquire([self.units[index]])
        return staged.buffer

    def release(self, index: int) -> None:
        self.residency.release([self.units[index]])

    def evict(self, index: int) -> None:
        self.loop.run(self.residency.evict([self.units[index]]))

    def settle(self) -> None:
        """Until prefetches and what they started are done."""

        async def nothing() -> None:
            return

        deadline = time.monotonic() + PATIENCE_S
        while True:
            self.loop.run(nothing())
            if not self.residency._fetching:
                return
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def loop_turns(self) -> None:
        """Fails while something blocks the loop's thread."""

        async def nothing() -> None:
            return

        self.loop.submit(nothing()).result(PATIENCE_S / 2)

    def close(self) -> None:
        self.loop.close()
        self.parts.close()


@pytest.fixture
def make_rig() -> Iterator[Callable[..., Rig]]:
    rigs: list[Rig] = []

    def make(slots: int, expected_order: list[int] | None = None) -> Rig:
        rigs.append(Rig(slots, expected_order or []))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


def in_thread(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, results


def test_unit_arrives_whole_and_is_not_fetched_twice(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(slots=4)
    for index in (0, 3, 0, 3):
        assert (rig.acquire(index) == index + 1).all()
        rig.release(index)
    rig.settle()
    assert rig.device.num_uploads == 2


def test_held_unit_is_never_evicted(make_rig: Callable[..., Rig]) -> None:
    """The held unit is the one that is needed last, which eviction would choose first."""
    rig = make_rig(slots=2, expected_order=[1, 2, 3, 1, 2, 3, 0])
    held = rig.acquire(0)
    for index in (1, 2, 3, 1, 2, 3):
        assert (rig.acquire(index) == index + 1).all()
        rig.release(index)
        rig.settle()
        assert (held == 1).all(), "a slot that is held was given away (and poisoned)"
    rig.release(0)


def test_unit_held_twice_stays_after_one_release(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(slots=1)
    buffer = rig.acquire(0)
    assert rig.acquire(0).data_ptr() == buffer.data_ptr()
    rig.release(0)
    with pytest.raises(BudgetExceeded):
        rig.acquire(1)
    assert (buffer == 1).all()
    rig.release(0)
    assert (rig.acquire(1) == 2).all()
    rig.release(1)


def test_eviction_waits_for_the_last_use(make_rig: Callable[..., Rig]) -> None:
    """Compute given before the release may still run: the slot may be overwritten only behind its event. The copy
    waits for that, and not the loop."""
    rig = make_rig(slots=1)
    buffer = rig.acquire(0)
    latch = rig.device.next_event = Latch()
    rig.release(0)
    thread, results = in_thread(lambda: rig.acquire(1))
    wait_for(latch, thread)
    rig.loop_turns()
    assert (buffer == 1).all() and results == []
    latch.passed.set()
    thread.join(PATIENCE_S)
    assert (results[0] == 2).all()
    rig.release(1)


def test_update_of_a_stale_unit_waits_for_the_last_use(make_rig: Callable[..., Rig]) -> None:
    """The new parameters go into the slot that backward has just been given compute on."""
    rig = make_rig(slots=1)
    rig.acquire(0)
    latch = rig.device.next_event = Latch()
    rig.release(0)
    rig.residency.expect({0: UnitUpdate(AdamW(), rig.parts.layouts[0], {}, 1.0)}, None)
    thread, results = in_thread(lambda: rig.acquire(0))
    wait_for(latch, thread)
    rig.loop_turns()
    assert results == []
    latch.passed.set()
    thread.join(PATIENCE_S)
    assert (results[0] == 1).all()
    rig.release(0)


def test_fetch_that_fails_before_its_copy_leaves_the_fence_to_the_next(
    make_rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make_rig(slots=1)
    buffer = rig.acquire(0)
    latch = rig.device.next_event = Latch()
    rig.release(0)

    def broken(*args: Any) -> None:
        raise OSError("link down")

    with monkeypatch.context() as patch:
        patch.setattr(rig.device, "upload", broken)
        with pytest.raises(OSError, match="link down"):
            rig.acquire(1)
    thread, results = in_thread(lambda: rig.acquire(2))
    wait_for(latch, thread)
    assert (buffer == 1).all() and results == []
    latch.passed.set()
    thread.join(PATIENCE_S)
    assert (results[0] == 3).all()
    rig.release(2)


def test_compute_that_runs_late_finds_its_units_bytes(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(slots=2, expected_order=[0, 1, 2, 3])
    readers = []
    with ThreadPoolExecutor(1) as stream:
        for index in torch.randint(4, (40,), generator=torch.Generator().manual_seed(0)).tolist():
            buffer = rig.acquire(index)
            reader = rig.device.next_event = LateReader(stream, buffer, index + 1, 0.01)
            readers.append(reader)
            rig.release(index)
    assert [reader.found_all.result() for reader in readers] == [True] * 40


class LateCompute(OneMemoryDevice):
    """One memory whose compute runs later than the thread that gives it."""

    def __init__(self) -> None:
        super().__init__()
        self.event = Latch()

    def record(self) -> Event:
        return self.event


@pytest.mark.parametrize("place", ["host", "nvme"])
def test_in_one_memory_nothing_is_written_under_compute(place: str, tmp_path: Path) -> None:
    """Neither the update where a unit rests or was staged, nor what else takes its room, while compute may read it."""
    device = LateCompute()
    settings = {"nvme": tmp_path, "homes": {"param": "nvme", "grad": "nvme"}} if place == "nvme" else {}
    device.event.passed.set()
    with OffloadEngine(
        nn.Linear(16, 16), AdamW(lr=0.1), OffloadConfig(device=device, update="step", **settings)
    ) as engine:
        loss = engine(torch.ones(1, 16, dtype=torch.bfloat16)).sum()
        device.event = Latch()
        buffer = engine._residency._staged[0].buffer
        before = buffer.clone()
        engine.backward(loss)
        thread, results = in_thread(engine.step)
        wait_for(device.event, thread)
        assert torch.equal(buffer, before) and results == []
        device.event.passed.set()
        thread.join(PATIENCE_S)
        assert results[0].step == 1 and not torch.equal(engine._residency._staged[0].buffer, before)


def test_in_one_memory_room_is_given_behind_compute() -> None:
    """Whoever makes room writes into it with the host's threads, which wait for no event."""
    with OffloadEngine(nn.Linear(16, 16), AdamW(), OffloadConfig(device=LateCompute(), micro_batches=2)) as engine:
        latch, stage = Latch(), Pool("stage", 4096, engine.device.allocate_host)
        engine._residency._pool = stage
        lease = stage.try_acquire(4096, "compute")
        assert lease is not None
        lease.release(after=latch)
        thread, results = in_thread(lambda: engine._loop.run(engine._residency.make_room(4096, "gradient")))
        wait_for(latch, thread)
        assert results == []
        latch.passed.set()
        thread.join(PATIENCE_S)
        assert results[0].fence is None or results[0].fence.has_passed()
        results[0].release()
        engine.device.event.passed.set()


def wait_for(latch: Latch, thread: threading.Thread) -> None:
    """Until somebody waits for the event; fails if the fetch in `thread` ends without having waited."""
    while not latch.waited_for.is_set() and thread.is_alive():
        time.sleep(0.001)
    assert latch.waited_for.is_set(), "the slot was taken without waiting for its last reader"


def test_values_of_a_held_unit_cannot_change(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(slots=2)
    buffer = rig.acquire(0)
    with pytest.raises(RuntimeError, match=r"unit '0' is in use by a forward or backward"):
        rig.evict(0)
    assert (buffer == 1).all()
    rig.release(0)
    rig.evict(0)
    assert rig.parts.slots.statistics().leased_nbytes == 0
    resting = rig.parts.resting[0]
    assert resting is not None
    resting.fill_(77)
    assert (rig.acquire(0) == 77).all(), "after an eviction the new values are fetched"
    rig.release(0)


def test_evict_waits_for_a_fetch_on_its_way(make_rig: Callable[..., Rig]) -> None:
    """Else a prefetch that began before an update would stage the old values after it."""
    rig = make_rig(slots=2, expected_order=[0])
    gate = rig.device.gate = threading.Event()
    rig.residency.ask_prefetch()
    while not rig.device.num_uploads:
        time.sleep(0.001)
    thread, results = in_thread(lambda: rig.evict(0))
    thread.join(0.05)
    assert thread.is_alive() and results == []
    rig.device.gate = None
    gate.set()
    thread.join(PATIENCE_S)
    assert results == [None]
    resting = rig.parts.resting[0]
    assert resting is not None
    resting.fill_(77)
    assert (rig.acquire(0) == 77).all()
    rig.release(0)


def test_too_many_held_units_is_an_error_not_a_hang(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(slots=2)
    rig.acquire(0)
    rig.acquire(1)
    with pytest.raises(
        BudgetExceeded, match=r"2/param needs 8192 bytes of device_memory, but all 16384 .*\(0/param, 1/param\)"
    ):
        rig.acquire(2)
    rig.release(0)
    assert (rig.acquire(2) == 3).all()
    rig.release(1)
    rig.release(2)


def test_waiting_fetch_goes_on_when_a_unit_is_let_go(make_rig: Callable[..., Rig]) -> None:
    """Another thread holds the only slot; a fetch of it is on its way, so waiting is not hopeless."""
    rig = make_rig(slots=1)
    gate = rig.device.gate = threading.Event()
    first, held = in_thread(lambda: rig.acquire(0))
    while not rig.device.num_uploads:
        time.sleep(0.001)
    second, results = in_thread(lambda: rig.acquire(0))
    rig.device.gate = None
    gate.set()
    for thread in (first, second):
        thread.join(PATIENCE_S)
    assert (held[0] == 1).all() and held[0].data_ptr() == results[0].data_ptr()
    assert rig.device.num_uploads == 1, "two who want one unit share one fetch"
    rig.release(0)
    rig.release(0)


def test_prefetch_follows_the_order_and_takes_only_free_room(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(slots=3, expected_order=[2, 0, 3, 1])
    rig.acquire(2)
    rig.settle()
    assert sorted(rig.residency._staged) == [0, 2, 3]
    for index in (2, 0, 3):
        assert (rig.acquire(index) == index + 1).all()
    assert rig.device.num_uploads == 3, "what was prefetched is not fetched again, and unit 1 found no room"
    for index in (2, 2, 0, 3):
        rig.release(index)


def test_failed_fetch_gives_its_slot_back_and_is_raised(make_rig: Callable[..., Rig], monkeypatch: Any) -> None:
    rig = make_rig(slots=1)

    def broken(*args: Any) -> None:
        raise OSError("link down")

    with monkeypatch.context() as patch:
        patch.setattr(rig.device, "upload", broken)
        with pytest.raises(OSError, match="link down"):
            rig.acquire(0)
    assert rig.parts.slots.statistics().leased_nbytes == 0
    assert (rig.acquire(0) == 1).all()
    rig.release(0)


def test_failure_of_a_later_unit_lets_go_of_the_earlier(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(slots=1)
    with pytest.raises(BudgetExceeded):
        rig.residency.acquire([rig.units[0], rig.units[1]])
    assert (rig.acquire(2) == 3).all(), "unit 0 must not be held any more"
    rig.release(2)


def test_random_uses_from_three_threads(make_rig: Callable[..., Rig]) -> None:
    """Each holder must find its unit's bytes as long as it holds it, whatever the others make evict."""
    rig = make_rig(slots=3, expected_order=[0, 1, 2, 3])
    failures: list[str] = []

    def use(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for index in torch.randint(4, (60,), generator=generator).tolist():
            buffer = rig.acquire(index)
            for _ in range(3):
                if not bool((buffer == index + 1).all()):
                    failures.append(f"unit {index} was overwritten while it was held")
            rig.release(index)

    threads = [in_thread(lambda seed=seed: use(seed)) for seed in range(3)]
    for thread, results in threads:
        thread.join(60)
        assert results == [None]
    assert failures == []
    rig.settle()
    assert rig.parts.slots.statistics().leased_nbytes <= 3 * UNIT_NBYTES
