"""The store: every unit's bytes on one or several drives, and the last committed step always whole."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from ..scheduler.lanes import Lanes
from ..scheduler.storage import NEEDED_LATER, NEEDED_SOON, Backend, DriveTuning, ensure_descriptors, view_of
from .codec import decode
from .commit import Committer
from .create import check_total_space, make_files, open_committed
from .document import STORE_NAME
from .endurance import EnduranceAccount
from .errors import ChecksumError, StoreError
from .extent import Extent
from .folder import Folders, clear_dead_runs, open_folders, remove_store_files
from .gate import Gate
from .gather import Gather, gather, wrong_buffer
from .genesis import Genesis, commit_interval
from .layout import Layout, plan_layout
from .mover import Mover
from .slots import ExtentSlots
from .statistics import StoreStatistics
from .tuning import shares_of, tunings_for

log = logging.getLogger(__name__)

DEFAULT_IN_FLIGHT_NBYTES = 256 << 20
DEFAULT_STALL_S = 120.0  # the kernel gives up on an NVMe request after 30 s and repeats it before it says so


class Store:
    """Pieces of extents, read and written whole; see `create` and `reopen`.

    `read`, `write` and `commit` run on one event loop; `close` and `statistics` may be called from any thread.
    Two coroutines never touch the same piece at once (the caller orders them); different pieces are free.

    Guarantees:
        - a read returns the newest bytes written in this process, or raises;
        - with durability other than "none", what lies on the drives is at every moment exactly one committed step;
        - no call waits for something that has no end, but for its own request to a drive that never answers: its buffer
          belongs to the drive until then. `statistics` and the log name the request, whatever waits behind it fails.

    Attributes: directories, durability, direct (O_DIRECT in use), read_nbytes, written_nbytes, step (last durable
    step or None), extra (what was committed with the step this store was re-opened at).
    """

    def __init__(
        self, folders: Folders, genesis: Genesis, layout: Layout, lanes: Lanes, *, verify: bool,
        tunings: Sequence[DriveTuning], max_in_flight_nbytes: int, stall_s: float | None, rated_nbytes: int | None,
        manifest: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.directories = folders.directories
        self.durability = genesis.durability
        self.extra: Mapping[str, Any] = decode(manifest["extra"]) if manifest else {}
        self._folders = folders
        self._verify = verify
        self._gate = Gate()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._slots = {extent.key: ExtentSlots(extent, genesis.num_slots) for extent in genesis.extents}
        for key, entry in (manifest["extents"] if manifest else {}).items():
            self._slots[key].restore(entry["slot"], entry["checksums"])
        self._mover = Mover(
            layout, folders.backends, tunings, lanes, gate=self._gate, max_in_flight_nbytes=max_in_flight_nbytes,
            stall_s=stall_s, hash_reads=verify, hash_writes=verify or genesis.every is not None,
        )  # fmt: skip
        self._endurance = EnduranceAccount(rated_nbytes, manifest["endurance"] if manifest else None)
        self._committer = Committer(
            store_id=genesis.store_id, slots=self._slots, mover=self._mover, manifest_backend=folders.backends[0],
            lanes=lanes, gate=self._gate, endurance=self._endurance, every=genesis.every,
            step=manifest["step"] if manifest else None,
        )  # fmt: skip
        self._closed = False
        try:
            self._mover.open_files(genesis.num_slots)
        except BaseException:
            self._mover.close_files()
            raise

    @classmethod
    def create(
        cls,
        directories: Sequence[Path | str],
        extents: Sequence[Extent],
        identity: Mapping[str, Any],
        lanes: Lanes,
        *,
        durability: Literal["step", "none"] | int = "none",
        verify: bool = True,
        backend: Callable[[Path], Backend] | None = None,
        overwrite: bool = False,
        tunings: Sequence[DriveTuning] | None = None,
        max_in_flight_nbytes: int = DEFAULT_IN_FLIGHT_NBYTES,
        stall_s: float | None = DEFAULT_STALL_S,
        rated_nbytes: int | None = None,
    ) -> Store:
        """Check, lock and prove the directories, and reserve all space. Blocks; called on the training thread.

        Args:
            directories: one per drive; missing ones are made (0700). The store lives in `offload-store` of each.
            extents: everything that will ever be read or written.
            identity: JSON-like facts (model, optimizer, dtype) that a later `reopen` must give again.
            lanes: reads run on `lanes.read`, writes and flushes on `lanes.write`.
            durability: "step" and N keep two slots (twice the space) and commit every step or every N-th; "none"
                keeps one slot and nothing survives the process.
            verify: compare the checksum of every piece that is read.
            backend: makes the backend of a store folder; None proves direct I/O and falls back to the page cache.
            overwrite: discard a dead run's store even if it could be resumed.
            tunings: chunk size, depth and bandwidth of each directory; None takes what was measured, or defaults.
            max_in_flight_nbytes: bound on the bytes in flight per directory.
            stall_s: when a request has been with the drive for so long, those that wait for their turn behind it raise
                DriveStalled; None waits for ever.
            rated_nbytes: rated endurance of the drives together, for the wear account.

        A dead run's store that cannot be resumed is replaced. On any failure nothing half-made is left.
        Raises: StoreBusy, StoreExists, StoreError (ValueError) for what the user can mend; NoSpace if a drive is too
            small; OffloadIOError if reserving fails.
        """
        commit_interval(durability)
        folders = open_folders(directories, backend, make=True)
        try:
            clear_dead_runs(folders.backends, overwrite=overwrite)
            check_total_space(folders.backends, extents, 1 if durability == "none" else 2)
            chosen = tunings_for(folders.backends, tunings, sum(extent.nbytes for extent in extents))
            shares = shares_of(chosen)
            genesis = Genesis.new(identity, durability, shares, folders.directories, extents)
            layout = plan_layout(extents, shares)
            ensure_descriptors(len(layout.file_names(genesis.num_slots)))
            with make_files(folders.backends, layout, genesis):
                return cls(
                    folders, genesis, layout, lanes, verify=verify, tunings=chosen,
                    max_in_flight_nbytes=max_in_flight_nbytes, stall_s=stall_s, rated_nbytes=rated_nbytes,
                )  # fmt: skip
        except BaseException:
            folders.undo()
            raise

    @classmethod
    def reopen(
        cls,
        directories: Sequence[Path | str],
        extents: Sequence[Extent],
        identity: Mapping[str, Any],
        lanes: Lanes,
        *,
        verify: bool = True,
        backend: Callable[[Path], Backend] | None = None,
        tunings: Sequence[DriveTuning] | None = None,
        max_in_flight_nbytes: int = DEFAULT_IN_FLIGHT_NBYTES,
        stall_s: float | None = DEFAULT_STALL_S,
        rated_nbytes: int | None = None,
    ) -> Store:
        """Open what a run that has ended left behind, at exactly its last committed step. Blocks.

        The directories may have moved but must be given in the same order. `step` and `extra` of the result are those
        of the last commit; durability is the store's own.
        Raises: StoreMissing, NotResumable, StoreMismatch (naming every difference), StoreCorrupt (naming the damage),
            StoreBusy; see `create` for the arguments.
        """
        folders = open_folders(directories, backend, make=False)
        try:
            genesis, manifest, layout = open_committed(folders.backends, folders.directories)
            genesis.refuse_other(identity, extents, folders.directories[0])
            ensure_descriptors(len(layout.file_names(genesis.num_slots)))
            return cls(
                folders, genesis, layout, lanes, verify=verify, manifest=manifest,
                tunings=tunings_for(folders.backends, tunings, 0), max_in_flight_nbytes=max_in_flight_nbytes,
                stall_s=stall_s, rated_nbytes=rated_nbytes,
            )  # fmt: skip
        except BaseException:
            folders.undo()
            raise

    async def read(self, key: str, piece: int, buffer: Tensor, *, needed: int = NEEDED_SOON) -> None:
        """Fill `buffer` (uint8 [piece_nbytes], page-aligned host memory) with the newest bytes of a piece.

        `needed` orders the queue of a drive (`scheduler.storage.NEEDED_NOW` ... `NEEDED_AT_COMMIT`).
        Raises: OffloadIOError; ChecksumError if other bytes come back than were written (verify on); StoreError for a
            piece without valid bytes; StoreClosed. The buffer belongs to the caller again in every case.
        """
        self._enter()
        slots, view = self._begin(key, piece, buffer)
        slot = slots.source(piece)
        found = await self._mover.read(slots.extent, piece, slot, view, needed)
        expected = slots.checksums[slot][piece]
        if self._verify and expected is not None and found != expected:
            raise self._damaged(slots.extent, piece, slot, expected, str(found))

    async def read_many(self, wanted: Sequence[tuple[str, int, Tensor]], *, needed: int = NEEDED_SOON) -> None:
        """`read` for many (key, piece, buffer) at once; small pieces go to the drive in batches of hundreds.

        Worth it from a few pieces of up to 256 KiB: a thread per 4 KiB read reaches a third of a drive's rate.
        Raises: as `read`, the first failure after every request has ended.
        """
        self._enter()
        by_key: dict[str, list[int]] = {}
        for index, (key, _, _) in enumerate(wanted):
            by_key.setdefault(key, []).append(index)
        gathers = []
        for key, indices in by_key.items():
            slots, sizes = self._extent(key), self._mover.sizes(key)
            gathers.append(gather(slots, sizes, [wanted[i][1] for i in indices], [wanted[i][2] for i in indices]))
        for known, found in zip(gathers, await self._mover.read_many(gathers, needed), strict=True):
            if self._verify:
                self._compare(known, found)

    def _compare(self, known: Gather, found: Sequence[str | None]) -> None:
        checksums = self._slots[known.extent.key].checksums
        expected = [checksums[slot][piece] for slot, piece in zip(known.slots, known.pieces, strict=True)]
        if expected == found:
            return
        for piece, slot, wanted, got in zip(known.pieces, known.slots, expected, found, strict=True):
            if wanted is not None and got != wanted:
                raise self._damaged(known.extent, piece, slot, wanted, str(got))

    async def write(self, key: str, piece: int, buffer: Tensor, *, needed: int = NEEDED_LATER) -> None:
        """Write `buffer` (uint8 [piece_nbytes], page-aligned host memory) as the newest bytes of a piece.

        Waits first for the commit that the piece is part of, if one is under way. The caller keeps `buffer` unchanged
        until this returns. Raises: OffloadIOError; StoreBroken after a failed commit; StoreClosed.
        """
        self._enter()
        slots, view = self._begin(key, piece, buffer)
        await self._committer.wait_writable(key)
        slot = slots.begin_write(piece)
        checksum = await self._mover.write(slots.extent, piece, slot, view, needed)
        slots.end_write(piece, slot, checksum)

    async def commit(self, step: int, extra: Mapping[str, Any] | None = None, *, force: bool = False) -> bool:
        """Make what was written so far durable as `step`, with `extra`; True once it is.

        Under durability N only every N-th step is kept unless `force`; under "none" none is. Writes of the next step
        wait only for the extents that this commit covers, reads never wait.
        Raises: StoreError if an extent was written in part or `extra` holds what JSON cannot; StoreBroken if it failed
            (the previous step is intact); StoreClosed.
        """
        self._enter()
        return await self._committer.commit(step, extra or {}, force=force)

    def revert(self, keys: Collection[str]) -> None:
        """Forget what was written to these extents since the last commit; reads give the committed bytes again.

        On the event loop, while nothing is written to them. Nothing moves: the other slot still holds that step.
        Raises: StoreError if an extent was never committed, or keeps one slot only.
        """
        for key in keys:
            self._extent(key).revert()

    def _enter(self) -> None:
        self._gate.check()
        self._loop = asyncio.get_running_loop()

    def _begin(self, key: str, piece: int, buffer: Tensor) -> tuple[ExtentSlots, memoryview]:
        slots, view = self._extent(key), view_of(buffer)
        sizes = slots.extent.piece_nbytes
        if not 0 <= piece < len(sizes) or len(view) != sizes[piece]:
            raise wrong_buffer(slots.extent, piece, len(view))
        return slots, view

    def _extent(self, key: str) -> ExtentSlots:
        slots = self._slots.get(key)
        if slots is None:
            raise StoreError(f"the store has no extent {key!r}; it was created with {list(self._slots)[:8]}")
        return slots

    def _damaged(self, extent: Extent, piece: int, slot: int, expected: str, found: str) -> ChecksumError:
        path, offset = self._mover.place(extent, piece, slot)
        return ChecksumError(
            f"{extent.described(piece)} at offset {offset} of {path} is damaged: its checksum is {found}, {expected} "
            f"was written. The drive or its cable is failing, or another program wrote to the file; look at the kernel "
            f"log, run `offload store verify`, and go on from another copy",
            key=extent.key, piece=piece, path=path, offset=offset, expected=expected, found=found,
        )  # fmt: skip

    @property
    def direct(self) -> bool:
        return all(backend.direct for backend in self._folders.backends)

    @property
    def read_nbytes(self) -> int:
        return self._mover.traffic.read_nbytes

    @property
    def written_nbytes(self) -> int:
        return self._mover.traffic.written_nbytes

    @property
    def step(self) -> int | None:
        return self._committer.durable_step

    def statistics(self) -> StoreStatistics:
        """A frozen snapshot of the figures of this run."""
        return StoreStatistics(
            read_nbytes=self.read_nbytes,
            written_nbytes=self.written_nbytes,
            num_retries=self._mover.traffic.num_retries,
            direct=self.direct,
            durable_step=self.step,
            num_commits=self._committer.num_commits,
            flush_s=self._committer.flush_s,
            publish_s=self._committer.publish_s,
            queues=tuple(queue.statistics() for queue in self._mover.queues),
            endurance=self._endurance.snapshot(self.written_nbytes),
        )

    def close(self, grace_s: float = 30.0) -> None:
        """Refuse new work, wait up to `grace_s` for requests in service, close the files, give the lock back.

        Does not commit: what was written after the last commit is dropped at the next `reopen`. With durability
        "none" the data files are removed, nothing could ever read them again. Safe to call twice.
        """
        if self._closed:
            return
        self._closed = True
        drained = self._gate.shut(grace_s)
        self._refuse_queued()
        if drained:
            self._mover.close_files()
            if self.durability == "none":
                for backend in self._folders.backends:
                    remove_store_files(backend, backend.names(), keep=[STORE_NAME])
        else:
            log.error(
                "%s: a request did not end within %.0f s; its files stay open: %s",
                self.directories[0],
                grace_s,
                ", ".join(queue.statistics().oldest for queue in self._mover.queues),
            )
        self._folders.release()

    def _refuse_queued(self) -> None:
        try:
            self._gate.check()
        except RuntimeError as error:
            for queue in self._mover.queues:
                # Futures belong to their loop's thread; set from here a waiter would not wake until something else did.
                if self._loop is not None and self._loop.is_running():
                    self._loop.call_soon_threadsafe(queue.refuse, error)
                else:
                    queue.refuse(error)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
