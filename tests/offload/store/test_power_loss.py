"""A power cut at any moment leaves exactly one committed step; and each guard that this rests on is needed."""

import asyncio
import random
from pathlib import Path

import pytest

from offload.scheduler.storage import MemoryBackend, OperationLog, RecordingBackend
from offload.store import ChecksumError, NotResumable, Store, StoreCorrupt, StoreError, StoreMissing
from offload.store import commit as commit_module
from offload.store import create as create_module
from offload.store import document as document_module
from offload.store.commit import Committer
from offload.store.folder import FOLDER_NAME, InMemory
from offload.store.slots import ExtentSlots

DIRECTORIES = [Path("/first"), Path("/second")]
NUM_STEPS = 5
NUM_CUTS = 400


class History:
    """What was written when: `written[step][extent key]` is the step that last wrote the extent, once `step` counts."""

    def __init__(self):
        self.log = OperationLog()
        self.written = {}
        self.commits = []  # (step, tick before the call, tick after it returned)


async def train(kit, members, lanes, history, seed):
    """Some steps, each writing some extents, while the commit of the step before may still be under way."""
    chance = random.Random(seed)
    store = Store.create(
        DIRECTORIES, members, kit.IDENTITY, lanes, durability="step",
        backend=InMemory(lambda root: RecordingBackend(MemoryBackend(root), history.log)),
    )  # fmt: skip
    now, commit = {}, None
    for step in range(NUM_STEPS):
        chosen = members if step == 0 else [extent for extent in members if chance.random() < 0.7]
        writes = asyncio.ensure_future(kit.write_step(store, chosen, step, commit=False))
        if commit is not None and chance.random() < 0.5:
            await commit
        await writes
        now = {**now, **{extent.key: step for extent in chosen}}
        history.written[step] = now
        if commit is not None:
            await commit
        commit = asyncio.ensure_future(commit_step(store, history, step))
        await asyncio.sleep(0)
    await commit
    store.close()


async def commit_step(store, history, step):
    before = history.log.now
    await store.commit(step, {"step": step})
    history.commits.append((step, before, history.log.now))


def check_cut(kit, members, lanes, history, tick, seed):
    """Open one state after a cut at `tick`. Raises what a user would see if a promise is broken."""
    files = history.log.after_power_cut(tick, random.Random(seed))
    sure = max((step for step, _, after in history.commits if after <= tick), default=None)
    begun = {step for step, before, _ in history.commits if before <= tick}
    try:
        store = Store.reopen(
            DIRECTORIES, members, kit.IDENTITY, lanes,
            backend=InMemory(lambda root: MemoryBackend(root, files=files.get(root, {}))),
        )  # fmt: skip
    except (NotResumable, StoreMissing) as error:
        assert sure is None, f"step {sure} was promised, but: {error}"
        return None
    with store:
        assert store.step == store.extra["step"]
        assert store.step in begun
        assert sure is None or store.step >= sure, f"step {sure} was promised, found {store.step}"
        written = history.written[store.step]
        for extent in members:
            kit.run(kit.check_step(store, [extent], written[extent.key]))
        return store.step


def broken_promises(kit, members, lanes, num_cuts=NUM_CUTS, seed=0):
    """Cuts, out of `num_cuts` at random moments, after which a promise was broken; and the steps that were found."""
    history = History()
    try:
        kit.run(train(kit, members, lanes, history, seed))
    except StoreError as error:
        return [("while training", repr(error))], set()
    chance = random.Random(seed)
    last = history.log.now
    ticks = [tick for _, before, after in history.commits for tick in (before, after)]
    ticks += [chance.randint(0, last) for _ in range(num_cuts - len(ticks))]
    broken, found = [], set()
    for cut, tick in enumerate(ticks):
        try:
            found.add(check_cut(kit, members, lanes, history, tick, cut))
        except (AssertionError, StoreCorrupt, ChecksumError, KeyError) as error:
            broken.append((tick, repr(error)))
    return broken, found


@pytest.fixture
def members(kit):
    return kit.extents(2, (kit.PAGE,), scratch=True)


@pytest.mark.parametrize("seed", range(3))
def test_any_cut_leaves_exactly_one_committed_step(kit, members, lanes, seed):
    broken, found = broken_promises(kit, members, lanes, seed=seed)
    assert broken == []
    # The cuts reached the whole run; a step whose successor was under way at once may have been seen by no cut.
    assert {None, NUM_STEPS - 1} <= found
    assert len(found) >= NUM_STEPS - 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 130))
def test_any_cut_leaves_exactly_one_committed_step_long(kit, members, lanes, seed):
    assert broken_promises(kit, members, lanes, num_cuts=1500, seed=seed)[0] == []


async def _no_flush(self, files):
    pass


async def _no_wait(self, key):
    pass


REMOVALS = {
    "flush of the data": lambda patch: patch.setattr(Committer, "_flush", _no_flush),
    "flush of the manifest": lambda patch: patch.setattr(document_module, "flush_fully", lambda file: None),
    "flush of the directory": lambda patch: patch.setattr(RecordingBackend, "sync_directory", lambda self: None),
    "flush of the reserved files": lambda patch: patch.setattr(create_module, "_flush", lambda backend, name: None),
    "wait for the commit before a write": lambda patch: (
        patch.setattr(Committer, "wait_writable", _no_wait),
        patch.setattr(
            ExtentSlots, "target", property(lambda self: 0 if self.committed is None else 1 - self.committed)
        ),
    ),
    "the other slot": lambda patch: patch.setattr(
        ExtentSlots, "target", property(lambda self: self.committed if self.committed is not None else 0)
    ),
    "temporary name and rename": lambda patch: patch.setattr(commit_module, "publish", _publish_in_place),
}


def _publish_in_place(backend, name, body):
    real = document_module.publish
    keep = backend.rename, document_module.TEMPORARY_SUFFIX
    document_module.TEMPORARY_SUFFIX = ""
    backend.rename = lambda source, target: None
    try:
        return real(backend, name, body)
    finally:
        backend.rename, document_module.TEMPORARY_SUFFIX = keep


@pytest.mark.parametrize("guard", REMOVALS)
def test_without_this_guard_the_model_finds_a_loss(kit, members, lanes, monkeypatch, guard):
    with monkeypatch.context() as patch:
        REMOVALS[guard](patch)
        broken = [loss for seed in range(6) for loss in broken_promises(kit, members, lanes, seed=seed)[0]]
    assert broken, f"no cut noticed that the {guard} is missing"


def test_reopened_after_a_cut_the_run_goes_on_and_survives_the_next_cut(kit, members, lanes):
    """Cuts upon cuts: each run adopts what the last cut left."""
    chance = random.Random(11)
    files = {directory / FOLDER_NAME: {} for directory in DIRECTORIES}
    done, num_steps = None, 0

    async def go_on(store, first):
        for step in range(first, first + 3):
            await kit.write_step(store, members, step)
            commits.append((step, log.now))

    for _ in range(25):
        log, commits = OperationLog(), []
        for root, content in files.items():
            log.adopt(root, content)
        adopted = log.now
        options = {
            "backend": InMemory(lambda root: RecordingBackend(MemoryBackend(root, files=files[root]), log))  # noqa: B023
        }
        if done is None:
            store = Store.create(
                DIRECTORIES, members, kit.IDENTITY, lanes, durability="step", overwrite=True, **options
            )
        else:
            store = Store.reopen(DIRECTORIES, members, kit.IDENTITY, lanes, **options)
            assert store.step >= done
            kit.run(kit.check_step(store, members, store.step))
        kit.run(go_on(store, 0 if store.step is None else store.step + 1))
        store.close()
        tick = chance.randint(adopted, log.now)
        files = {root: log.after_power_cut(tick, chance).get(root, {}) for root in files}
        done = max((step for step, after in commits if after <= tick), default=done)
        num_steps = max(num_steps, done or 0)
    assert num_steps > 20
