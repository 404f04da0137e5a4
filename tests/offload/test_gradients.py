"""Gradients on their way home: in order per unit, few at a time, and never lost."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offload import SGD, OffloadConfig
from offload.assembly import assemble
from offload.gradients import MAX_IN_FLIGHT, Contribution, Gradients, by_itemsize, unpack
from offload.homes import Home, gather_all
from offload.scheduler.loop import LoopThread

PATIENCE_S = 20


class SlowStore:
    """Keeps pieces in memory; writes wait until the test opens `gate`."""

    def __init__(self) -> None:
        self.pieces: dict[tuple[str, int], Tensor] = {}
        self.gate = threading.Event()
        self.num_begun = 0
        self.num_reads = 0

    async def read(self, key: str, piece: int, buffer: Tensor, *, needed: int = 0) -> None:
        self.num_reads += 1
        buffer.copy_(self.pieces[key, piece])

    async def write(self, key: str, piece: int, buffer: Tensor) -> None:
        self.num_begun += 1
        assert await asyncio.to_thread(self.gate.wait, PATIENCE_S)
        self.pieces[key, piece] = buffer.clone()


async def settled(units: Any) -> None:
    """No update is ever pending here."""


class Rig:
    """Gradients of three units, Linear(16, 16) in fp32, that rest in a `SlowStore`."""

    def __init__(self, num_backwards: int, in_store: bool = True) -> None:
        model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))
        config = OffloadConfig(device="cpu", dtype=torch.float32, micro_batches=num_backwards, host_memory="64MiB")
        self.parts = assemble(model, SGD(), config)
        self.store = SlowStore()
        if in_store:
            for layout, homes in zip(self.parts.layouts, self.parts.homes, strict=True):
                homes["grad"] = Home(layout.unit.name, "grad", layout.pieces["grad"], store=self.store)
        self.loop = LoopThread()
        stage = type(self.parts.stage)("test memory", 1 << 20, self.parts.device.allocate_host)
        self.gradients = Gradients(
            self.parts.layouts,
            self.parts.homes,
            self.parts.device,
            self.parts.lanes,
            self.loop,
            stage.acquire,
            num_backwards,
            settled,
        )
        self.weights = [layer.weight for layer in model]

    def give(self, index: int, value: float) -> None:
        """What autograd does: leave a gradient of `value` everywhere."""
        weight = self.weights[index]
        weight.grad = torch.full_like(weight, value)
        self.gradients.take(weight)
        assert weight.grad is None

    def total(self, index: int) -> Tensor:
        """The accumulated gradient of weight `index`."""
        layout = self.parts.layouts[index]
        home = self.parts.homes[index]["grad"]
        buffer = home.buffer
        if buffer is None:
            buffer = torch.empty(home.nbytes, dtype=torch.uint8)
            self.loop.run(home.read_all(buffer))
        return layout.grad_view(buffer, layout.by_parameter[self.weights[index]])

    def close(self) -> None:
        self.store.gate.set()
        self.loop.close()
        self.parts.close()


@pytest.fixture
def make_rig() -> Iterator[Callable[..., Rig]]:
    rigs: list[Rig] = []

    def make(*args: Any, **kwargs: Any) -> Rig:
        rigs.append(Rig(*args, **kwargs))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


def test_gradients_of_one_unit_come_home_in_the_order_they_were_sent(make_rig: Callable[..., Rig]) -> None:
    """The second must not read the sum before the first has written it, or one of them is lost."""
    rig = make_rig(2)
    rig.give(0, 1.0)
    rig.gradients.flush(0, more_to_come=False)
    rig.gradients.end_backward()
    while not rig.store.num_begun:
        time.sleep(0.001)
    # What a rash reader would see:
    rig.store.pieces = {(f"{i}/grad", 0): torch.zeros(8192, dtype=torch.uint8) for i in range(3)}
    rig.give(0, 2.0)
    rig.gradients.flush(0, more_to_come=False)
    rig.gradients.end_backward()
    deadline = time.monotonic() + 0.2
    while not rig.store.num_reads and time.monotonic() < deadline:
        time.sleep(0.001)
    assert rig.store.num_reads == 0, "the sum was read before the first gradient was in it"
    rig.store.gate.set()
    rig.gradients.wait()
    assert (rig.total(0) == 3.0).all()
    assert rig.gradients.total_square(rig.weights) == 9.0 * 256


def test_back_pressure(make_rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients on their way are memory outside of every budget, so backward waits when there are too many."""
    assert MAX_IN_FLIGHT == 2
    monkeypatch.setattr("offload.gradients.SMALL_NBYTES", 0)
    rig = make_rig(1)
    sent: list[int] = []

    def backward() -> None:
        for index in range(3):
            rig.give(index, 1.0)
            rig.gradients.flush(index, more_to_come=False)
            sent.append(index)

    thread = threading.Thread(target=backward)
    thread.start()
    while rig.store.num_begun < 2:
        time.sleep(0.001)
    thread.join(0.1)
    assert thread.is_alive() and sent == [0, 1], "the third must wait"
    rig.store.gate.set()
    thread.join(PATIENCE_S)
    assert sent == [0, 1, 2]
    rig.gradients.end_backward()
    rig.gradients.wait()
    assert all((rig.total(index) == 1.0).all() for index in range(3))
    _, waits = rig.parts.lanes.trace.drain()
    assert [wait.unit for wait in waits] == ["2"], "the wait is recorded"


def test_small_gradients_do_not_wait_for_each_other(make_rig: Callable[..., Rig]) -> None:
    """The same three as above, of 1 KiB each: all are sent before the first has come home."""
    rig = make_rig(1)
    for index in range(3):
        rig.give(index, 1.0)
        rig.gradients.flush(index, more_to_come=False)
    rig.store.gate.set()
    rig.gradients.end_backward()
    rig.gradients.wait()
    assert all((rig.total(index) == 1.0).all() for index in range(3))
    assert rig.parts.lanes.trace.drain()[1] == []


def test_slots_come_back_after_a_failure(make_rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that fails more often than there are slots: every failure is raised, none blocks for ever."""
    monkeypatch.setattr("offload.gradients.SMALL_NBYTES", 0)
    rig = make_rig(1)
    rig.store.gate.set()

    async def broken(key: str, piece: int, buffer: Tensor) -> None:
        raise OSError("drive")

    with monkeypatch.context() as patch:
        patch.setattr(rig.store, "write", broken)
        for _ in range(2 * MAX_IN_FLIGHT):
            rig.give(0, 1.0)
            rig.gradients.flush(0, more_to_come=False)
        with pytest.raises(OSError, match="drive"):
            rig.gradients.wait()
    rig.gradients.drop()
    rig.give(0, 5.0)
    rig.gradients.flush(0, more_to_come=False)
    rig.gradients.end_backward()
    rig.gradients.wait()
    assert (rig.total(0) == 5.0).all()


@pytest.mark.parametrize("in_store", [True, False])
def test_sum_over_calls_is_complete_before_it_is_added(make_rig: Callable[..., Rig], in_store: bool) -> None:
    """fp32: (a + b) + c differs from a + (b + c). Torch adds one backward's complete sum to what was there."""
    a, b, c = 1.0, 2.0**-24, 2.0**-24
    assert torch.tensor(a) + b + c != torch.tensor(a) + (b + c)
    rig = make_rig(2, in_store=in_store)
    rig.store.gate.set()
    rig.give(0, a)
    rig.gradients.flush(0, more_to_come=False)
    rig.gradients.end_backward()
    rig.give(0, b)
    rig.gradients.flush(0, more_to_come=True)
    rig.give(0, c)
    rig.gradients.flush(0, more_to_come=False)
    rig.gradients.end_backward()
    rig.gradients.wait()
    assert (rig.total(0) == 1.0 + 2.0**-23).all()


def test_drop_waits_for_what_is_on_its_way(make_rig: Callable[..., Rig]) -> None:
    """Else a dropped gradient would still arrive, and leave its norm, in the next step."""
    rig = make_rig(1, in_store=False)
    gate = threading.Event()
    lane = rig.parts.lanes.cpu
    blockers = [
        rig.loop.submit(lane.run(gate.wait, PATIENCE_S, unit="", kind="", nbytes=0)) for _ in range(lane.num_threads)
    ]
    rig.give(0, 1.0)
    rig.gradients.flush(0, more_to_come=False)
    rig.give(1, 1.0)  # taken and not sent
    thread = threading.Thread(target=rig.gradients.drop)
    thread.start()
    thread.join(0.05)
    assert thread.is_alive(), "the gradient is still on its way"
    gate.set()
    thread.join(PATIENCE_S)
    assert all(blocker.result(PATIENCE_S) for blocker in blockers)
    assert rig.gradients.present() == set() and rig.gradients.num_backwards == 0
    rig.give(2, 4.0)
    rig.gradients.flush(2, more_to_come=False)
    rig.gradients.end_backward()
    rig.gradients.wait()
    assert rig.gradients.total_square(rig.weights) == 16.0 * 256
    assert (rig.total(2) == 4.0).all()


def test_norm_is_exact_and_in_the_order_of_names(make_rig: Callable[..., Rig]) -> None:
    """float64: 256 * (2**-20)**2 would vanish beside 256 * 1.0 in fp32."""
    rig = make_rig(1, in_store=False)
    for index, value in ((2, 2.0**-20), (0, 1.0)):
        rig.give(index, value)
        rig.gradients.flush(index, more_to_come=False)
    rig.gradients.end_backward()
    rig.gradients.wait()
    assert rig.gradients.total_square(rig.weights) == 256.0 + 256 * 2.0**-40


def test_packed_gradients_are_aligned_and_come_apart_again(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(1)
    members = [rig.parts.layouts[i].by_parameter[rig.weights[i]] for i in range(3)]
    gradients = [torch.arange(3).bfloat16(), torch.arange(5).float(), torch.arange(7).bfloat16()]
    contributions = [Contribution(m, g, True) for m, g in zip(members, gradients, strict=True)]
    packed = torch.cat([c.gradient.view(torch.uint8) for c in by_itemsize(contributions)])
    apart = {c.member.info.name: c.gradient for c in unpack(contributions, packed)}
    for member, gradient in zip(members, gradients, strict=True):
        assert torch.equal(apart[member.info.name], gradient)


def test_gather_all_outlives_the_first_failure() -> None:
    """The caller releases buffers when it raises, so no sibling may still be running then."""
    ended: list[str] = []

    async def fail() -> None:
        raise OSError("first")

    async def slow() -> None:
        await asyncio.sleep(0.02)
        ended.append("slow")

    async def main() -> None:
        with pytest.raises(OSError, match="first"):
            await gather_all([fail(), slow()])
        assert ended == ["slow"]

    asyncio.run(main())
