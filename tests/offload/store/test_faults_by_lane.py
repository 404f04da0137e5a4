"""A drive that fails, on each lane: the right exception, no hang, the last step intact."""

import asyncio
import errno
import os
import sys
import threading

import pytest
import torch

from offload.scheduler.storage import (
    NUM_RETRIES,
    DriveStalled,
    DriveTuning,
    Fault,
    FaultyBackend,
    OffloadIOError,
    PosixBackend,
)
from offload.store import Store, StoreClosed

LANES = ["read", "write"]
PIECE_NBYTES = 3 << 19  # two requests of at most 1 MiB


@pytest.fixture
def rig(make, kit, lanes, tmp_path, monkeypatch):
    """A store with one committed step over a drive whose `rig.faults` may be set."""
    monkeypatch.setattr("offload.scheduler.storage.transfer.RETRY_PAUSE_S", 0.0)
    members = kit.extents(2, (2 * kit.PAGE, PIECE_NBYTES))
    store = make(members, durability="step", backend=lambda root: FaultyBackend(PosixBackend(root, direct=False)),
                 tunings=[DriveTuning(chunk_nbytes=1 << 20)])  # fmt: skip
    kit.run(kit.write_step(store, members, 1))
    kit.store, kit.members, kit.faults = store, members, store._folders.backends[0].faults

    plain_run = kit.run

    def run(coroutine):
        async def guarded():
            faults = kit.faults
            try:
                return await coroutine
            finally:
                for fault in faults:  # a failed assertion must not leave threads waiting for ever
                    if fault.stall is not None and sys.exc_info()[0] is not None:
                        fault.stall.set()

        return plain_run(guarded(), 20.0)

    kit.run = run

    def intact(step=1):
        kit.faults.clear()
        store.close()
        with Store.reopen([tmp_path / "nvme"], members, kit.IDENTITY, lanes) as again:
            assert again.step == step
            kit.run(kit.check_step(again, members, step))

    kit.intact = intact
    return kit


async def touch(kit, lane, key="blocks.0/states", piece=1):
    buffer = kit.pages(PIECE_NBYTES, 4)
    await getattr(kit.store, lane)(key, piece, buffer)
    return buffer


@pytest.mark.parametrize("lane", LANES)
def test_one_eio_is_retried_and_counted(rig, lane):
    rig.faults.append(Fault(operation=lane, number=errno.EIO, times=1))
    rig.run(touch(rig, lane))
    assert rig.store.statistics().num_retries == 1
    rig.intact()


@pytest.mark.parametrize("lane", LANES)
def test_lasting_eio_names_path_offset_and_parameters(rig, lane):
    fault = Fault(operation=lane, number=errno.EIO, times=None)
    rig.faults.append(fault)
    with pytest.raises(OffloadIOError, match=f"after {NUM_RETRIES} retries: EIO") as caught:
        rig.run(touch(rig, lane))
    assert caught.value.path.name == f"unit-blocks.0.slot{0 if lane == 'read' else 1}"
    assert caught.value.offset >= 2 * rig.PAGE + PIECE_NBYTES + 2 * rig.PAGE
    assert "blocks.0.weight" in "".join(caught.value.__notes__)
    assert rig.store.statistics().in_flight_nbytes == 0
    rig.intact()


@pytest.mark.parametrize("fault", ["EIO", "cut short"])
def test_a_failure_inside_a_batch_names_its_piece(rig, tmp_path, kit, make, fault):
    members = kit.extents(3, (kit.PAGE,) * 50)
    plain = {"EIO": lambda root: FaultyBackend(PosixBackend(root, direct=False)), "cut short": None}
    store = make(members, [tmp_path / "batch"], durability="step", backend=plain[fault])
    kit.run(kit.write_step(store, members, 1))
    wanted = [(f"blocks.{i % 3}/param", i // 3, kit.allocate(kit.PAGE)) for i in range(150)]
    if fault == "EIO":
        broken = Fault(operation="read", number=errno.EIO, name="blocks.1", skip=20, times=NUM_RETRIES + 1)
        store._folders.backends[0].faults.append(broken)
    else:
        path = tmp_path / "batch" / "offload-store" / "unit-blocks.1.slot0"
        os.truncate(path, 20 * kit.PAGE)
        wanted = wanted[:63]  # the 21st piece of blocks.1 is the first that is not there any more
    with pytest.raises(OffloadIOError) as caught:
        kit.run(store.read_many(wanted))
    assert (caught.value.path.name, caught.value.offset) == ("unit-blocks.1.slot0", 20 * kit.PAGE)
    assert "while read moved piece 20 of 50 of blocks.1/param (parameters blocks.1.weight" in caught.value.__notes__[0]
    assert store.statistics().in_flight_nbytes == 0


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("limit", [512, 4096, 100_000])
def test_short_transfers_change_nothing(rig, lane, limit):
    fault = Fault(operation=lane, at_most_nbytes=limit, times=30)
    rig.faults.append(fault)
    rig.run(rig.write_step(rig.store, rig.members, 2))
    rig.run(rig.check_step(rig.store, rig.members, 2))
    assert fault.hits == 30
    rig.intact(2)


@pytest.mark.parametrize("lane", LANES)
def test_a_stalled_request_holds_up_only_itself_and_is_named(rig, lane):
    stall = threading.Event()
    fault = Fault(operation=lane, name="blocks.0", stall=stall)
    rig.faults.append(fault)

    async def body():
        stuck = asyncio.ensure_future(touch(rig, lane))
        while not fault.reached.is_set():  # noqa: ASYNC110 - the fault is hit in another thread
            await asyncio.sleep(0.001)
        for other in LANES:
            await touch(rig, other, "blocks.1/states")
        facts = rig.store.statistics().queues[0]
        assert facts.num_in_flight == 1
        assert facts.oldest.startswith(f"{lane} blocks.0/states[1] unit-blocks.0.slot")
        assert facts.oldest_s > 0
        assert not stuck.done()
        stall.set()
        await stuck

    rig.run(body())
    rig.intact()


@pytest.mark.parametrize("lane", LANES)
def test_what_waits_behind_a_drive_that_never_answers_is_told(rig, lane):
    """All places of the lane are taken by requests that do not end; their buffers stay theirs until they do."""
    queue, stall = rig.store._mover.queues[0], threading.Event()
    queue.stall_s, queue.lane_depth = 0.05, 1
    fault = Fault(operation=lane, name="blocks.0", stall=stall)
    rig.faults.append(fault)

    async def body():
        stuck = asyncio.ensure_future(touch(rig, lane))
        while not fault.reached.is_set():  # noqa: ASYNC110 - the fault is hit in another thread
            await asyncio.sleep(0.001)
        with pytest.raises(DriveStalled, match=f"{lane} blocks.0/states") as caught:
            await touch(rig, lane, "blocks.1/states")
        assert caught.value.age_s >= 0.05
        assert "blocks.1.weight" in "".join(caught.value.__notes__)
        assert not stuck.done()
        stall.set()
        with pytest.raises(DriveStalled):  # its second request waited as well
            await stuck
        assert rig.store.statistics().in_flight_nbytes == 0
        await touch(rig, lane)

    rig.run(body())
    rig.intact()


@pytest.mark.slow
@pytest.mark.parametrize("lane", [*LANES, "flush"])
def test_a_stall_of_two_seconds_is_only_slow(rig, lane):
    stall = threading.Event()
    rig.faults.append(Fault(operation=lane, stall=stall))
    timer = threading.Timer(2.0, stall.set)
    timer.start()
    rig.run(rig.write_step(rig.store, rig.members, 2))
    rig.run(rig.check_step(rig.store, rig.members, 2))
    timer.join()
    rig.intact(2)


def test_a_full_drive_in_the_middle_of_a_step_fails_the_step_and_keeps_the_last(rig):
    rig.faults.append(Fault(operation="write", number=errno.ENOSPC, skip=3, times=None))
    with pytest.raises(OffloadIOError, match="free space on this drive") as caught:
        rig.run(rig.write_step(rig.store, rig.members, 2))
    assert caught.value.errno == errno.ENOSPC
    rig.intact()


@pytest.mark.parametrize("lane", LANES)
def test_a_failed_piece_returns_only_when_none_of_its_requests_uses_the_buffer(rig, lane):
    """The first chunk fails at once, the second is still moving: the caller must not get its buffer back before."""
    stall = threading.Event()
    rig.faults.append(Fault(operation=lane, stall=stall, skip=1, times=1))
    rig.faults.append(Fault(operation=lane, number=errno.EBADF, times=1))

    async def body():
        failing = asyncio.ensure_future(touch(rig, lane))
        await asyncio.sleep(0.05)
        assert not failing.done()
        stall.set()
        with pytest.raises(OffloadIOError):
            await failing

    rig.run(body())
    rig.intact()


@pytest.mark.parametrize("lane", LANES)
def test_a_cancelled_piece_returns_only_when_none_of_its_requests_uses_the_buffer(rig, lane):
    stall = threading.Event()
    fault = Fault(operation=lane, stall=stall, times=2)
    rig.faults.append(fault)

    async def body():
        call = asyncio.ensure_future(touch(rig, lane))
        while not fault.reached.is_set():  # noqa: ASYNC110 - the fault is hit in another thread
            await asyncio.sleep(0.001)
        call.cancel()
        await asyncio.sleep(0.02)
        assert not call.done()
        stall.set()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert rig.store.statistics().in_flight_nbytes == 0

    rig.run(body())
    rig.intact()


def test_bytes_whose_overwriting_failed_are_not_trusted(make, kit):
    """One slot: after a failed write neither the old nor the new bytes are there."""
    store = make(kit.extents(1, (kit.PAGE,)), backend=lambda root: FaultyBackend(PosixBackend(root, direct=False)))
    buffer = kit.pages(kit.PAGE, 1)
    kit.run(store.write("blocks.0/param", 0, buffer))
    store._folders.backends[0].faults.append(Fault(operation="write", number=errno.EROFS))
    with pytest.raises(OffloadIOError):
        kit.run(store.write("blocks.0/param", 0, buffer))
    with pytest.raises(ValueError, match="its last write failed"):
        kit.run(store.read("blocks.0/param", 0, buffer))
    kit.run(store.write("blocks.0/param", 0, buffer))
    got = kit.allocate(kit.PAGE)
    kit.run(store.read("blocks.0/param", 0, got))
    assert torch.equal(got, buffer)


@pytest.mark.parametrize("lane", LANES)
def test_closing_fails_what_is_queued_and_waits_for_what_runs(rig, lane):
    stall = threading.Event()
    fault = Fault(operation=lane, stall=stall, times=4)
    rig.faults.append(fault)

    async def body():
        calls = [asyncio.ensure_future(touch(rig, lane)) for _ in range(8)]
        while fault.hits < 4:  # noqa: ASYNC110 - the fault is hit in other threads
            await asyncio.sleep(0.001)
        closing = asyncio.get_running_loop().run_in_executor(None, rig.store.close)
        await asyncio.sleep(0.05)
        assert not closing.done()
        stall.set()
        results = await asyncio.gather(*calls, return_exceptions=True)
        await closing
        # The two pieces whose requests were all in service were finished, the others fail, none hangs.
        assert [type(result) for result in results] == [torch.Tensor] * 2 + [StoreClosed] * 6

    rig.run(body())
    rig.intact()


def test_closing_gives_up_on_a_drive_that_never_answers_and_says_so(rig, caplog):
    stall = threading.Event()
    fault = Fault(operation="read", stall=stall)
    rig.faults.append(fault)

    async def body():
        call = asyncio.ensure_future(touch(rig, "read"))
        while not fault.reached.is_set():  # noqa: ASYNC110 - the fault is hit in another thread
            await asyncio.sleep(0.001)
        await asyncio.get_running_loop().run_in_executor(None, rig.store.close, 0.05)
        stall.set()
        await asyncio.gather(call, return_exceptions=True)

    rig.run(body())
    assert "a request did not end within" in caplog.text
    assert "read blocks.0/states[1]" in caplog.text
    rig.store._mover.close_files()
    rig.intact()
