"""The store against a plain dict: any sequence of writes, reads, commits, failures and crashes."""

import random
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from offload.scheduler.lanes import Lanes
from offload.scheduler.storage import Fault, FaultyBackend, MemoryBackend, OperationLog, RecordingBackend
from offload.scheduler.trace import Trace
from offload.store import Extent, NotResumable, Store, StoreError, StoreMissing
from offload.store.folder import FOLDER_NAME, InMemory

from .conftest import IDENTITY, PAGE, pages, run

DIRECTORIES = [Path("/one"), Path("/two")]
MEMBERS = [
    Extent(key=f"u{unit}/{kind}", unit=f"u{unit}", kind=kind, piece_nbytes=(PAGE,) * (unit + 1), scratch=kind == "grad")
    for unit in range(2)
    for kind in ("param", "states", "grad")
]
PIECES = [(extent.key, piece) for extent in MEMBERS for piece in range(len(extent.piece_nbytes))]


class StoreMachine(RuleBasedStateMachine):
    """`newest` is what a read must return, `committed` what a re-opened store must hold."""

    def __init__(self):
        super().__init__()
        self.lanes = Lanes(Trace(), num_io_threads=2)
        self.files = {directory / FOLDER_NAME: {} for directory in DIRECTORIES}
        self.newest = {}
        self.committed = None
        self.opened = None
        self.candidates = []
        self.version = 0
        self.step = 0
        self.store = None

    def backend(self, root):
        recording = RecordingBackend(MemoryBackend(root, files=self.files[root]), self.log)
        self.drives.append(FaultyBackend(recording))
        return self.drives[-1]

    @initialize(durability=st.sampled_from(["step", 2]))
    def create(self, durability):
        self.durability = durability
        self.open()

    def open(self):
        self.log, self.drives = OperationLog(), []
        for root, content in self.files.items():
            self.log.adopt(root, content)
        self.adopted = self.log.now
        options = {"backend": InMemory(self.backend)}
        try:
            self.store = Store.reopen(DIRECTORIES, MEMBERS, IDENTITY, self.lanes, **options)
        except (NotResumable, StoreMissing):
            assert self.committed is None
            self.store = Store.create(
                DIRECTORIES, MEMBERS, IDENTITY, self.lanes, durability=self.durability, overwrite=True, **options
            )

    @rule(extent=st.sampled_from(MEMBERS))
    def write(self, extent):
        for piece in range(len(extent.piece_nbytes)):
            self.version += 1
            run(self.store.write(extent.key, piece, pages(PAGE, self.version)))
            self.newest[extent.key, piece] = self.version

    @rule(extent=st.sampled_from([extent for extent in MEMBERS if len(extent.piece_nbytes) > 1 and not extent.scratch]))
    def write_in_part_is_not_committed(self, extent):
        self.commit(force=False)  # a new step, of which the extent has no piece yet
        self.version += 1
        run(self.store.write(extent.key, 0, pages(PAGE, self.version)))
        self.newest[extent.key, 0] = self.version
        with pytest.raises(StoreError, match="in part"):
            run(self.store.commit(self.step + 1, {}, force=True))
        self.write(extent)

    @precondition(lambda self: self.newest)
    @rule(data=st.data())
    def failed_write_changes_nothing_or_is_known(self, data):
        key, piece = data.draw(st.sampled_from(sorted(self.newest)))
        for drive in self.drives:
            drive.faults.append(Fault(operation="write", name="unit-", number=28, times=None))
        with pytest.raises(OSError, match="ENOSPC"):
            run(self.store.write(key, piece, pages(PAGE, 0)))
        for drive in self.drives:
            drive.faults.clear()
        try:
            got = torch.empty(PAGE, dtype=torch.uint8)
            run(self.store.read(key, piece, got))
            assert torch.equal(got, pages(PAGE, self.newest[key, piece]))
        except StoreError as error:
            assert "last write failed" in str(error)
        self.write(next(extent for extent in MEMBERS if extent.key == key))

    @rule(force=st.booleans())
    def commit(self, force):
        self.step += 1
        before = self.log.now
        if run(self.store.commit(self.step, {"step": self.step}, force=force)):
            self.candidates.append((before, self.log.now, self.step, self.durable_part()))
            self.committed = self.candidates[-1]

    def durable_part(self):
        return {place: version for place, version in self.newest.items() if "grad" not in place[0]}

    @rule(seed=st.integers(0, 1 << 20))
    def power_cut(self, seed):
        """The power fails at a random moment since the store was opened; the run goes on from what is left."""
        self.store.close()
        chance = random.Random(seed)
        tick = chance.randint(self.adopted, self.log.now)
        previous = [entry for entry in self.candidates if entry[1] <= tick] or [self.base()]
        begun = [entry for entry in self.candidates if entry[0] <= tick < entry[1]]
        self.files = {root: self.log.after_power_cut(tick, chance).get(root, {}) for root in self.files}
        self.reopen_one_of([previous[-1], *begun])

    @rule()
    def close_and_open(self):
        self.store.close()
        self.files = {drive.root: drive.inner.inner.contents() for drive in self.drives}
        self.reopen_one_of([self.candidates[-1] if self.candidates else self.base()])

    def base(self):
        """What the store held when it was opened, None if nothing."""
        return self.opened

    def reopen_one_of(self, allowed):
        if None in allowed:
            self.committed = None
        self.open()
        found = self.store.step
        entry = next((entry for entry in allowed if (entry[2] if entry else None) == found), "nothing")
        assert entry != "nothing", f"found step {found}, allowed {[entry and entry[2] for entry in allowed]}"
        self.opened = entry and (-1, -1, *entry[2:])
        self.committed, self.candidates = self.opened, []
        self.newest = dict(entry[3]) if entry else {}
        assert self.store.extra == ({"step": found} if entry else {})

    @invariant()
    def every_read_returns_the_newest_version(self):
        if self.store is None:
            return
        got = torch.empty(PAGE, dtype=torch.uint8)
        for key, piece in PIECES:
            if (key, piece) in self.newest:
                run(self.store.read(key, piece, got))
                assert torch.equal(got, pages(PAGE, self.newest[key, piece])), (key, piece)
            else:
                with pytest.raises(StoreError, match="no valid bytes"):
                    run(self.store.read(key, piece, got))

    def teardown(self):
        if self.store is not None:
            self.store.close()
        self.lanes.close()


SUPPRESSED = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
quick = settings(max_examples=15, stateful_step_count=20, deadline=None, suppress_health_check=SUPPRESSED,
                 derandomize=True, database=None)  # fmt: skip
StoreMachine.TestCase.settings = quick
TestStoreIsADict = StoreMachine.TestCase


class LongMachine(StoreMachine):
    """The same, longer and random."""


LongMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=60, deadline=None, suppress_health_check=SUPPRESSED, database=None
)
TestStoreIsADictLong = pytest.mark.slow(pytest.mark.timeout(1200)(LongMachine.TestCase))
