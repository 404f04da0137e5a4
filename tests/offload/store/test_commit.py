"""A committed step comes back exactly; what came after it is gone; what is not whole is not committed."""

import asyncio
import errno
import threading

import pytest
import torch

from offload.scheduler.storage import Fault, FaultyBackend, PosixBackend
from offload.store import Extent, NotResumable, Store, StoreBroken, StoreError, StoreMismatch, StoreMissing


def reopen(kit, lanes, directories, members, **options):
    return Store.reopen(directories, members, kit.IDENTITY, lanes, **options)


@pytest.mark.parametrize("num_directories", [1, 2])
def test_reopen_is_exactly_the_last_committed_step(make, kit, lanes, tmp_path, num_directories):
    members = kit.extents(2, (3 * kit.PAGE, (3 << 20) + kit.PAGE))
    directories = [tmp_path / f"d{index}" for index in range(num_directories)]
    store = make(members, directories, durability="step")
    for step in range(4):
        kit.run(kit.write_step(store, members, step))
        assert store.step == step
    kit.run(kit.write_step(store, members, 4, commit=False))
    kit.run(kit.check_step(store, members, 4))  # newest in this process ...
    store.close()
    with reopen(kit, lanes, directories, members) as again:
        assert (again.step, again.extra, again.durability) == (3, {"step": 3}, "step")
        kit.run(kit.check_step(again, members, 3))  # ... but only the commit counts after it
        kit.run(kit.write_step(again, members, 4))
    with reopen(kit, lanes, directories, members) as again:
        kit.run(kit.check_step(again, members, 4))


def test_a_step_may_leave_extents_out(make, kit, lanes, tmp_path):
    """An idle expert keeps the bytes of the step that last wrote it, through any number of commits."""
    members = kit.extents(3, scratch=False)
    store = make(members, durability="step")
    kit.run(kit.write_step(store, members, 0))
    for step in (1, 2, 3):
        kit.run(kit.write_step(store, members[:2], step))
    kit.run(kit.write_step(store, members[2:4], 4))
    store.close()
    with reopen(kit, lanes, [tmp_path / "nvme"], members) as again:
        kit.run(kit.check_step(again, members[:2], 3))
        kit.run(kit.check_step(again, members[2:4], 4))
        kit.run(kit.check_step(again, members[4:], 0))


def test_copies_of_what_rests_in_host_memory_are_written_only_and_read_at_resume(make, kit, lanes, tmp_path):
    host = Extent(key="host/param", unit="host", kind="param", piece_nbytes=(kit.PAGE, 2 * kit.PAGE))
    members = [*kit.extents(1, scratch=False), host]
    store = make(members, durability=2)
    for step in range(5):
        # Written only in the steps that commit, as the engine does with what it keeps in memory.
        kit.run(kit.write_step(store, members if step % 2 == 0 else members[:2], step))
    assert store.read_nbytes == 0
    store.close()
    with reopen(kit, lanes, [tmp_path / "nvme"], members) as again:
        assert again.step == 4
        kit.run(kit.check_step(again, members, 4))


@pytest.mark.parametrize(("durability", "kept"), [("step", [1, 2, 3, 4, 5, 6, 7]), (3, [1, 4, 7]), (100, [1])])
def test_every_nth_step_is_kept(make, kit, lanes, tmp_path, durability, kept):
    members = kit.extents(1)
    store = make(members, durability=durability)
    durable = []
    for step in range(1, 8):
        kit.run(kit.write_step(store, members, step, commit=False))
        if kit.run(store.commit(step, {"step": step})):
            durable.append(step)
    assert durable == kept
    assert store.statistics().num_commits == len(kept)
    store.close()
    with reopen(kit, lanes, [tmp_path / "nvme"], members) as again:
        assert again.step == kept[-1]
        kit.run(kit.check_step(again, members, kept[-1]))


def test_a_forced_commit_keeps_the_newest_step(make, kit, lanes, tmp_path):
    members = kit.extents(1)
    store = make(members, durability=10)
    for step in (1, 2, 3):
        kit.run(kit.write_step(store, members, step))
    assert kit.run(store.commit(3, {"step": 3}, force=True))
    store.close()
    with reopen(kit, lanes, [tmp_path / "nvme"], members) as again:
        kit.run(kit.check_step(again, members, 3))


def test_without_durability_a_commit_does_nothing_and_reopen_says_so(make, kit, lanes, tmp_path):
    members = kit.extents(1)
    store = make(members)
    kit.run(kit.write_step(store, members, 1))
    assert store.step is None
    store.close()
    with pytest.raises(NotResumable, match=r'durability "none".*durability="step"'):
        reopen(kit, lanes, [tmp_path / "nvme"], members)


def test_a_run_that_never_committed_is_not_resumable(make, kit, lanes, tmp_path):
    members = kit.extents(1)
    make(members, durability="step").close()
    with pytest.raises(NotResumable, match="ended before its first commit"):
        reopen(kit, lanes, [tmp_path / "nvme"], members)
    with pytest.raises(StoreMissing, match=r"holds a store|holds no store"):
        reopen(kit, lanes, [tmp_path / "elsewhere"], members)
    assert not (tmp_path / "elsewhere").exists()


def test_an_extent_written_in_part_is_not_committed(make, kit, lanes, tmp_path):
    members = kit.extents(1)
    store = make(members, durability="step")
    kit.run(kit.write_step(store, members, 1))
    kit.run(store.write("blocks.0/states", 1, kit.pages(kit.PAGE, 1)))
    with pytest.raises(StoreError, match=r"step 2 wrote blocks\.0/states in part: pieces \[0\] of 2"):
        kit.run(store.commit(2, {}))
    kit.run(store.write("blocks.0/states", 0, kit.pages(2 * kit.PAGE, 1)))
    kit.run(store.commit(2, {}))
    assert store.step == 2


def test_an_extent_whose_writes_all_failed_is_not_committed(make, kit, lanes, tmp_path):
    members = kit.extents(1, (kit.PAGE,), scratch=False)
    faults = []
    backend = lambda root: FaultyBackend(PosixBackend(root, direct=False), faults)  # noqa: E731
    store = make(members, durability="step", backend=backend)
    kit.run(kit.write_step(store, members, 1))
    store._folders.backends[0].faults.append(Fault(operation="write", number=errno.ENOSPC, times=None))
    with pytest.raises(OSError, match="ENOSPC"):
        kit.run(store.write("blocks.0/states", 0, kit.pages(kit.PAGE, 5)))
    store._folders.backends[0].faults.clear()
    kit.run(kit.check_step(store, members, 1))  # the other slot still has the newest whole bytes
    with pytest.raises(StoreError, match="in part"):
        kit.run(store.commit(2, {}))
    assert store.step == 1


def test_steps_only_go_up(make, kit):
    members = kit.extents(1)
    store = make(members, durability="step")
    kit.run(kit.write_step(store, members, 5))
    with pytest.raises(StoreError, match="steps only go up"):
        kit.run(store.commit(4, {}))


def test_extra_comes_back_exactly(make, kit, lanes, tmp_path):
    import numpy as np

    members = kit.extents(1)
    store = make(members, durability="step")
    kit.run(kit.write_step(store, members, 0, commit=False))
    extra = {
        "rng": torch.get_rng_state(), "python": (3, (1, 2, 3), None), "lr": 0.1 + 0.2, "inf": float("inf"),
        "bytes": b"\0\xff", "by id": {1: "a", (2, 3): [True, None]}, "bf16": torch.tensor([[1.5], [-0.0]]).bfloat16(),
        "empty": torch.empty(0, 3), "scalar": torch.tensor(7), "numpy": np.arange(6, dtype=np.int16).reshape(2, 3),
        "float64": np.float64(1 / 3), "nested": {"__offload__": "tuple"},
    }  # fmt: skip
    kit.run(store.commit(0, extra))
    store.close()
    with reopen(kit, lanes, [tmp_path / "nvme"], members) as again:
        assert set(again.extra) == set(extra)
        for name, value in extra.items():
            got = again.extra[name]
            assert type(got) is type(value), name
            if isinstance(value, torch.Tensor):
                assert got.dtype == value.dtype
                assert got.shape == value.shape
                assert torch.equal(got, value)
            elif isinstance(value, np.ndarray):
                assert got.dtype == value.dtype
                assert np.array_equal(got, value)
            else:
                assert got == value, name


def test_extra_that_cannot_be_stored_is_named_before_anything_happens(make, kit):
    members = kit.extents(1)
    store = make(members, durability="step")
    kit.run(kit.write_step(store, members, 1))
    with pytest.raises(StoreError, match=r"extra\.scheduler\.lr_lambdas\[0\] is a function"):
        kit.run(store.commit(2, {"scheduler": {"lr_lambdas": [lambda step: step]}}))
    kit.run(store.commit(2, {}))


def test_another_identity_is_refused_with_every_difference(make, kit, lanes, tmp_path):
    members = kit.extents(2)
    store = make(members, durability="step")
    kit.run(kit.write_step(store, members, 1))
    store.close()
    before = kit.tree(tmp_path)
    other = {"model": {"hidden": 16}, "optimizer": "adamw", "seed": 1}
    with pytest.raises(StoreMismatch) as caught:
        Store.reopen([tmp_path / "nvme"], members, other, lanes)
    for line in ("dtype: the store has 'bfloat16', this run has none", "model.hidden: the store has 8, this run has 16",
                 "seed: the store has none, this run has 1"):  # fmt: skip
        assert line in str(caught.value)
    fewer = members[:-3]
    with pytest.raises(StoreMismatch, match=r"extents\.blocks\.1/param: the store has"):
        reopen(kit, lanes, [tmp_path / "nvme"], fewer)
    changed = [Extent(key=m.key, unit=m.unit, kind=m.kind, piece_nbytes=(kit.PAGE, kit.PAGE), scratch=m.scratch,
                      parameters=m.parameters) for m in members]  # fmt: skip
    with pytest.raises(StoreMismatch, match=r"piece_nbytes\[0\]: the store has 8192, this run has 4096"):
        reopen(kit, lanes, [tmp_path / "nvme"], changed)
    after = kit.tree(tmp_path)
    assert {n: d for n, d in before.items() if "lock" not in n} == {n: d for n, d in after.items() if "lock" not in n}
    reopen(kit, lanes, [tmp_path / "nvme"], members).close()


def test_directories_in_another_order_or_number_are_refused_and_moved_ones_are_not(make, kit, lanes, tmp_path):
    members = kit.extents(1)
    store = make(members, [tmp_path / "a", tmp_path / "b"], durability="step")
    kit.run(kit.write_step(store, members, 1))
    store.close()
    with pytest.raises(StoreMissing, match="holds part 1 of store"):
        reopen(kit, lanes, [tmp_path / "b", tmp_path / "a"], members)
    with pytest.raises(StoreMissing, match="lies on 2 directories"):
        reopen(kit, lanes, [tmp_path / "a"], members)
    (tmp_path / "a").rename(tmp_path / "moved")
    with reopen(kit, lanes, [tmp_path / "moved", tmp_path / "b"], members) as again:
        kit.run(kit.check_step(again, members, 1))


def gated(name):
    """(backend factory, fault): the named flush waits for the fault's event."""
    fault = Fault(operation="flush", name=name, stall=threading.Event(), skip=0)
    return (lambda root: FaultyBackend(PosixBackend(root, direct=False), [fault])), fault


def test_a_write_waits_for_the_commit_that_holds_its_extent_and_reads_do_not(make, kit, lanes, tmp_path):
    members = kit.extents(2, (kit.PAGE,), scratch=False)
    backend, fault = gated("manifest")
    fault.skip = 1
    store = make(members, durability="step", backend=backend)

    async def body():
        await kit.write_step(store, members, 1)
        await kit.write_step(store, members[:2], 2, commit=False)
        commit = asyncio.ensure_future(store.commit(2, {"step": 2}))
        while not fault.reached.is_set():  # noqa: ASYNC110 - the fault is hit in another thread
            await asyncio.sleep(0.001)
        await kit.check_step(store, members[:2], 2)
        await kit.write_step(store, members[2:], 3, commit=False)  # another unit, not in this commit: free
        blocked = asyncio.ensure_future(kit.write_step(store, members[:2], 3, commit=False))
        await asyncio.sleep(0.05)
        assert not blocked.done()
        assert not commit.done()
        assert store.step == 1
        fault.stall.set()
        await asyncio.gather(commit, blocked)
        assert store.step == 2

    kit.run(body())
    store.close()
    with reopen(kit, lanes, [tmp_path / "nvme"], members) as again:
        kit.run(kit.check_step(again, members[:2], 2))
        kit.run(kit.check_step(again, members[2:], 1))


def test_commits_that_overlap_become_durable_in_order_and_do_not_mix_steps(make, kit, lanes, tmp_path):
    members = kit.extents(2, (kit.PAGE,), scratch=False)
    backend, fault = gated("manifest")
    fault.skip = 1
    store = make(members, durability="step", backend=backend)

    async def body():
        await kit.write_step(store, members, 1)
        await kit.write_step(store, members[:2], 2, commit=False)
        second = asyncio.ensure_future(store.commit(2, {"step": 2}))
        await asyncio.sleep(0)
        await kit.write_step(store, members[2:], 3, commit=False)
        third = asyncio.ensure_future(store.commit(3, {"step": 3}))
        await asyncio.sleep(0)
        fourth = asyncio.ensure_future(kit.write_step(store, members, 4, commit=False))
        await asyncio.sleep(0.02)
        assert not (second.done() or third.done() or fourth.done())
        fault.stall.set()
        await asyncio.gather(second, third, fourth)
        assert store.step == 3

    kit.run(body())
    store.close()
    with reopen(kit, lanes, [tmp_path / "nvme"], members) as again:
        assert (again.step, again.extra) == (3, {"step": 3})
        kit.run(kit.check_step(again, members[:2], 2))
        kit.run(kit.check_step(again, members[2:], 3))


@pytest.mark.parametrize("operation", ["flush data", "write manifest", "flush manifest", "rename", "sync_directory"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_commit_that_fails_breaks_the_store_and_leaves_a_whole_step(make, kit, lanes, tmp_path, operation, number):
    members = kit.extents(2)
    verb, _, what = operation.partition(" ")
    name = {"data": "slot", "manifest": "manifest", "": ""}[what]
    store = make(members, durability="step", backend=lambda root: FaultyBackend(PosixBackend(root, direct=False)))
    kit.run(kit.write_step(store, members, 1))
    fault = Fault(operation=verb, name=name, number=number, times=None)

    async def body():
        await kit.write_step(store, members, 2, commit=False)
        store._folders.backends[0].faults.append(fault)
        commit = asyncio.ensure_future(store.commit(2, {"step": 2}))
        await asyncio.sleep(0)
        waiting = asyncio.ensure_future(kit.write_step(store, members, 3, commit=False))
        with pytest.raises(StoreBroken, match="step 1 is intact") as caught:
            await commit
        assert caught.value.__cause__.errno == number
        with pytest.raises(StoreBroken):  # the writer that waited gets the same exception, and no hang
            await waiting
        with pytest.raises(StoreBroken):
            await store.commit(3, {})
        await kit.check_step(store, members, 2)  # reading goes on

    kit.run(body())
    assert fault.hits > 0
    store.close()
    with reopen(kit, lanes, [tmp_path / "nvme"], members) as again:
        # Only when the directory flush alone failed may the new step be there; whichever it is, it is whole.
        assert again.step in ((1, 2) if operation == "sync_directory" else (1,))
        kit.run(kit.check_step(again, members, again.step))


def test_a_cancelled_commit_breaks_the_store_but_not_the_step(make, kit, lanes, tmp_path):
    members = kit.extents(1)
    backend, fault = gated("manifest")
    fault.skip = 1
    store = make(members, durability="step", backend=backend)

    async def body():
        await kit.write_step(store, members, 1)
        await kit.write_step(store, members, 2, commit=False)
        commit = asyncio.ensure_future(store.commit(2, {}))
        while not fault.reached.is_set():  # noqa: ASYNC110 - the fault is hit in another thread
            await asyncio.sleep(0.001)
        commit.cancel()
        await asyncio.sleep(0)
        fault.stall.set()
        with pytest.raises(asyncio.CancelledError):
            await commit
        with pytest.raises(StoreBroken):
            await store.write("blocks.0/param", 0, kit.pages(2 * kit.PAGE, 1))

    kit.run(body())
    store.close()
    with reopen(kit, lanes, [tmp_path / "nvme"], members) as again:
        assert again.step in (1, 2)
        kit.run(kit.check_step(again, members, again.step))


def test_the_wear_account_goes_on_over_resumes(make, kit, lanes, tmp_path):
    members = kit.extents(1, (kit.PAGE,), scratch=True)
    store = make(members, durability="step", rated_nbytes=kit.PAGE * 100)
    for step in range(3):
        kit.run(kit.write_step(store, members, step))
    kit.run(store.write("blocks.0/grad", 0, kit.pages(kit.PAGE, 0)))
    kit.run(kit.write_step(store, members, 3))
    store.close()
    with reopen(kit, lanes, [tmp_path / "nvme"], members) as again:
        account = again.statistics().endurance
        assert (account.written_nbytes, account.step_nbytes, account.num_commits) == (9 * kit.PAGE, 3 * kit.PAGE, 4)
        assert (account.rated_nbytes, account.rated_share) == (100 * kit.PAGE, 0.09)
        kit.run(kit.write_step(again, members, 4))
        account = again.statistics().endurance
        assert (account.written_nbytes, account.step_nbytes, account.num_commits) == (11 * kit.PAGE, 2 * kit.PAGE, 5)
        assert account.per_day_nbytes == pytest.approx(account.written_nbytes / account.active_s * 86400)
