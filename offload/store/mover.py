"""Pieces to files and back: cut into requests, queued per drive, run on the lanes, hashed on the way."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..scheduler.lanes import Lane, Lanes
from ..scheduler.storage import (
    Backend,
    DriveQueue,
    DriveTuning,
    ReadBatch,
    StorageFile,
    read_batch,
    read_fully,
    view_of,
    write_fully,
)
from .checksum import block_digests, piece_checksum, small_checksum
from .extent import Extent
from .gate import Gate
from .gather import Gather, PieceTable
from .layout import Layout, Segment, file_name, stem_of
from .plan import ReadPlan

Transfer = Callable[[StorageFile, memoryview, int], int]


@dataclass(slots=True)
class Traffic:
    """What has been moved so far. Changed on the loop's thread only."""

    read_nbytes: int = 0
    written_nbytes: int = 0
    num_retries: int = 0


def _job(
    gate: Gate, transfer: Transfer, file: StorageFile, view: memoryview, offset: int, chunk_nbytes: int, hashed: bool
) -> tuple[int, bytes]:
    """Move `view` request by request and hash each one's bytes while they are near; other threads use the drive then.

    Returns: how many requests had to be retried, and the block digests (empty without hashing).
    """
    num_retries, digests = 0, []
    with gate:
        for start in range(0, len(view), chunk_nbytes):
            part = view[start : start + chunk_nbytes]
            num_retries += transfer(file, part, offset + start)
            if hashed:
                digests.append(block_digests(part))
    return num_retries, b"".join(digests)


def _batch_job(gate: Gate, batch: ReadBatch, hashed: bool) -> tuple[int, list[Any]]:
    with gate:
        return read_batch(batch, small_checksum if hashed else None)


class Mover:
    """Owns the open files and the queues. Its coroutines run on one event loop.

    Guarantees: a coroutine here does not end, not even when cancelled or failed, before every request it has begun
    has ended; so its caller may release the buffer whatever came out.
    """

    def __init__(
        self, layout: Layout, backends: Sequence[Backend], tunings: Sequence[DriveTuning], lanes: Lanes, *,
        gate: Gate, max_in_flight_nbytes: int, stall_s: float | None, hash_reads: bool, hash_writes: bool,
    ) -> None:  # fmt: skip
        self._layout = layout
        self._backends = backends
        self._lanes = lanes
        self._gate = gate
        self._hash_reads = hash_reads
        self._hash_writes = hash_writes
        self._files: dict[tuple[int, str], StorageFile] = {}
        self._files_lock = threading.Lock()
        self._tables: dict[str, PieceTable] = {}
        self._sizes: dict[str, np.ndarray] = {}
        self._tunings = list(tunings)
        # Each drive gets its share of the lane's threads, so that a slow drive cannot take all of them.
        threads = max(1, lanes.read.num_threads // len(backends))
        # One request more than the best depth: while one is handed from thread to thread the drive has the others.
        # `tuning.depth` is per direction: with the drive's best depth of reads in flight a write needs its own place.
        self.queues = [
            DriveQueue(
                str(backend.root),
                depth=2 * tuning.depth,
                lane_depth=min(threads, tuning.depth + 1),
                max_in_flight_nbytes=max_in_flight_nbytes,
                stall_s=stall_s,
            )
            for backend, tuning in zip(backends, tunings, strict=True)
        ]
        self.traffic = Traffic()

    def open_files(self, num_slots: int) -> None:
        """Open all files of the layout now, so that a missing file or a limit shows at the start. Blocks."""
        for directory, name, _ in self._layout.file_names(num_slots):
            self.file(directory, name)

    def file(self, directory: int, name: str) -> StorageFile:
        """The open file, opened at its first use. May be called from any thread."""
        with self._files_lock:
            file = self._files.get((directory, name))
            if file is None:
                file = self._files[directory, name] = self._backends[directory].open(name)
            return file

    def files_of(self, extent: Extent, slot: int) -> set[tuple[int, str]]:
        """(directory, name) of the files that hold one slot of an extent."""
        name = file_name(stem_of(extent.unit), slot, extent.scratch)
        return {(run.directory, name) for runs in self._layout.segments[extent.key] for run in runs}

    def place(self, extent: Extent, piece: int, slot: int) -> tuple[str, int]:
        """Path and offset where a piece begins, for messages."""
        run = self._layout.segments[extent.key][piece][0]
        name = file_name(stem_of(extent.unit), slot, extent.scratch)
        return str(self._backends[run.directory].root / name), run.offset

    async def read(self, extent: Extent, piece: int, slot: int, view: memoryview, needed: int) -> str | None:
        """Fill `view`; returns the checksum of what came, None if hashing is off. Raises: OffloadIOError."""
        checksum = await self._move(self._lanes.read, read_fully, self._hash_reads, extent, piece, slot, view, needed)
        self.traffic.read_nbytes += len(view)
        return checksum

    async def write(self, extent: Extent, piece: int, slot: int, view: memoryview, needed: int) -> str | None:
        """Write `view`; returns its checksum, None if hashing is off. Raises: OffloadIOError."""
        checksum = await self._move(
            self._lanes.write, write_fully, self._hash_writes, extent, piece, slot, view, needed
        )
        self.traffic.written_nbytes += len(view)
        return checksum

    def sizes(self, key: str) -> np.ndarray:
        """Lengths of the pieces of an extent, int64 [num_pieces]."""
        known = self._sizes.get(key)
        if known is None:
            runs_of = self._layout.segments[key]
            known = self._sizes[key] = np.array([sum(run.nbytes for run in runs) for runs in runs_of])
        return known

    async def read_many(self, gathers: Sequence[Gather], needed: int) -> list[list[str | None]]:
        """Checksums of all pieces of each gather, read together where they are small, None where hashing is off.

        Raises: the first failure, after every request has ended.
        """
        found: list[list[str | None]] = [[None] * len(member.pieces) for member in gathers]
        plan = ReadPlan(gathers, [self._table(member.extent.key) for member in gathers], self._file_of)

        async def one(owner: int, index: int) -> None:
            member = gathers[owner]
            view = view_of(member.buffers[index])
            found[owner][index] = await self.read(
                member.extent, member.pieces[index], member.slots[index], view, needed
            )

        async def some(directory: int, chosen: np.ndarray) -> None:
            batch, first = plan.batch(chosen), plan.extent_of(chosen[0])
            nbytes = int(batch.nbytes.sum())
            try:
                num_retries, checksums = await self.queues[directory].run(
                    self._lanes.read, _batch_job, self._gate, batch, self._hash_reads,
                    unit=first.unit, kind=first.kind, nbytes=nbytes, needed=needed,
                    label=f"read of {len(batch)} pieces from {first.key}[{plan.piece_of(chosen[0])}] on",
                )  # fmt: skip
            except OSError as error:
                error.add_note(f"while read moved {plan.described(chosen, error)}")
                raise
            self.traffic.num_retries += num_retries
            self.traffic.read_nbytes += nbytes
            for owner, index, checksum in zip(
                plan.owner[chosen].tolist(), plan.index[chosen].tolist(), checksums, strict=True
            ):
                found[owner][index] = checksum

        await _all(
            [one(int(plan.owner[at]), int(plan.index[at])) for at in np.flatnonzero(plan.directory < 0)]
            + [some(directory, chosen) for directory, chosen in plan.batches(len(self.queues))]
        )
        return found

    def _table(self, key: str) -> PieceTable:
        table = self._tables.get(key)
        if table is None:
            table = self._tables[key] = PieceTable.of(self._layout.segments[key])
        return table

    def _file_of(self, extent: Extent, directory: int, slot: int) -> StorageFile:
        return self.file(directory, file_name(stem_of(extent.unit), slot, extent.scratch))

    async def _move(
        self, lane: Lane, transfer: Transfer, hashed: bool, extent: Extent, piece: int, slot: int, view: memoryview,
        needed: int,
    ) -> str | None:  # fmt: skip
        name = file_name(stem_of(extent.unit), slot, extent.scratch)
        cuts = [cut for run in self._layout.segments[extent.key][piece] for cut in self._cut(run)]
        label = f"{lane.name} {extent.key}[{piece}]"

        async def one(cut: Segment) -> tuple[int, bytes]:
            part = view if len(cuts) == 1 else view[cut.piece_offset : cut.piece_offset + cut.nbytes]
            return await self.queues[cut.directory].run(
                lane, _job, self._gate, transfer, self.file(cut.directory, name), part, cut.offset,
                self._tunings[cut.directory].chunk_nbytes, hashed,
                unit=extent.unit, kind=extent.kind, nbytes=cut.nbytes, needed=needed,
                label=f"{label} {name} at {cut.offset}",
            )  # fmt: skip

        try:
            if len(cuts) == 1:
                results = [await one(cuts[0])]
            else:
                results = await _all(one(cut) for cut in cuts)
        except OSError as error:
            error.add_note(f"while {lane.name} moved {extent.described(piece)}")
            raise
        self.traffic.num_retries += sum(num_retries for num_retries, _ in results)
        return piece_checksum([digests for _, digests in results]) if hashed else None

    def _cut(self, run: Segment) -> list[Segment]:
        size = self._tunings[run.directory].job_nbytes(run.nbytes)
        return [
            Segment(run.directory, run.offset + start, run.piece_offset + start, min(size, run.nbytes - start))
            for start in range(0, run.nbytes, size)
        ]

    def close_files(self) -> None:
        """Close every file. No request may be in flight: the number of a closed descriptor is soon another file's."""
        with self._files_lock:
            files, self._files = self._files, {}
        for file in files.values():
            file.close()


async def _all(coroutines) -> list:  # type: ignore[no-untyped-def]
    """Results of all coroutines; the first failure is raised only after every one of them has ended."""
    results = await asyncio.gather(*coroutines, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results
