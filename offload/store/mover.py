"""Pieces to files and back: cut into requests, queued per drive, run on the lanes, hashed on the way."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from ..scheduler.lanes import Lane, Lanes
from ..scheduler.storage import Backend, DriveQueue, DriveTuning, StorageFile, read_batch, read_fully, write_fully
from .checksum import block_digests, piece_checksum
from .extent import Extent
from .gate import Gate
from .layout import Layout, Segment, file_name, stem_of

SMALL_NBYTES = 256 << 10  # up to here a piece is better read together with others than in a thread of its own
BATCH_PIECES = 512


@dataclass(slots=True)
class Traffic:
    """What has been moved so far. Changed on the loop's thread only."""

    read_nbytes: int = 0
    written_nbytes: int = 0
    num_retries: int = 0


def _read_job(gate: Gate, file: StorageFile, view: memoryview, offset: int) -> int:
    with gate:
        return read_fully(file, view, offset)


def _write_job(gate: Gate, file: StorageFile, view: memoryview, offset: int) -> int:
    with gate:
        return write_fully(file, view, offset)


def _batch_job(gate: Gate, files: list[StorageFile], views: list[memoryview], offsets: list[int]) -> int:
    with gate:
        return read_batch(files, views, offsets)


class Mover:
    """Owns the open files and the queues. Its coroutines run on one event loop.

    Guarantees: a coroutine here does not end, not even when cancelled or failed, before every request it has begun
    has ended; so its caller may release the buffer whatever came out.
    """

    def __init__(
        self, layout: Layout, backends: Sequence[Backend], tunings: Sequence[DriveTuning], lanes: Lanes, *,
        gate: Gate, max_in_flight_nbytes: int, hash_reads: bool, hash_writes: bool,
    ) -> None:  # fmt: skip
        self._layout = layout
        self._backends = backends
        self._lanes = lanes
        self._gate = gate
        self._hash_reads = hash_reads
        self._hash_writes = hash_writes
        self._files: dict[tuple[int, str], StorageFile] = {}
        self._files_lock = threading.Lock()
        self._chunk_nbytes = [tuning.chunk_nbytes for tuning in tunings]
        # Each drive gets its share of the lane's threads, so that a slow drive cannot take all of them.
        threads = max(1, lanes.read.num_threads // len(backends))
        # `tuning.depth` is per direction: with the drive's best depth of reads in flight a write needs its own place.
        self.queues = [
            DriveQueue(
                str(backend.root),
                depth=2 * tuning.depth,
                lane_depth=min(threads, tuning.depth),
                max_in_flight_nbytes=max_in_flight_nbytes,
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
        checksum = await self._move(self._lanes.read, _read_job, self._hash_reads, extent, piece, slot, view, needed)
        self.traffic.read_nbytes += len(view)
        return checksum

    async def write(self, extent: Extent, piece: int, slot: int, view: memoryview, needed: int) -> str | None:
        """Write `view`; returns its checksum, None if hashing is off. Raises: OffloadIOError."""
        checksum = await self._move(self._lanes.write, _write_job, self._hash_writes, extent, piece, slot, view, needed)
        self.traffic.written_nbytes += len(view)
        return checksum

    async def read_many(self, wanted: Sequence[tuple[Extent, int, int, memoryview]], needed: int) -> list[str | None]:
        """Checksums of many pieces (extent, piece, slot, view), read together where they are small.

        Raises: the first failure, after every request has ended.
        """
        batches: dict[int, list[int]] = {}
        single = []
        for index, (extent, piece, _, view) in enumerate(wanted):
            runs = self._layout.segments[extent.key][piece]
            if len(runs) == 1 and len(view) <= SMALL_NBYTES:
                batches.setdefault(runs[0].directory, []).append(index)
            else:
                single.append(index)
        checksums: list[str | None] = [None] * len(wanted)

        async def one(index: int) -> None:
            checksums[index] = await self.read(*wanted[index], needed)

        async def some(directory: int, indices: list[int]) -> None:
            chosen = [wanted[index] for index in indices]
            runs = [self._layout.segments[extent.key][piece][0] for extent, piece, _, _ in chosen]
            known: dict[tuple[str, int], StorageFile] = {}
            for extent, _, slot, _ in chosen:
                if (extent.key, slot) not in known:
                    name = file_name(stem_of(extent.unit), slot, extent.scratch)
                    known[extent.key, slot] = self.file(directory, name)
            files = [known[extent.key, slot] for extent, _, slot, _ in chosen]
            views = [view for _, _, _, view in chosen]
            nbytes = sum(map(len, views))
            hashed = self._hash_reads
            num_retries, digests = await self.queues[directory].run(
                self._lanes.read, _batch_job, self._gate, files,
                views, [run.offset for run in runs],
                after=lambda num_retries: (num_retries, [block_digests(v) if hashed else b"" for v in views]),
                unit=chosen[0][0].unit, kind=chosen[0][0].kind, nbytes=nbytes, needed=needed,
                label=f"read of {len(chosen)} pieces from {chosen[0][0].key}[{chosen[0][1]}] on",
            )  # fmt: skip
            self.traffic.num_retries += num_retries
            self.traffic.read_nbytes += nbytes
            for index, digest in zip(indices, digests, strict=True):
                checksums[index] = piece_checksum([digest]) if self._hash_reads else None

        await _all(
            [one(index) for index in single]
            + [
                some(directory, indices[start : start + BATCH_PIECES])
                for directory, indices in batches.items()
                for start in range(0, len(indices), BATCH_PIECES)
            ]
        )
        return checksums

    async def _move(self, lane: Lane, job, hashed, extent, piece, slot, view, needed) -> str | None:  # type: ignore[no-untyped-def]
        name = file_name(stem_of(extent.unit), slot, extent.scratch)
        cuts = [cut for run in self._layout.segments[extent.key][piece] for cut in self._cut(run)]
        label = f"{lane.name} {extent.key}[{piece}]"

        async def one(cut: Segment) -> tuple[int, bytes]:
            part = view if len(cuts) == 1 else view[cut.piece_offset : cut.piece_offset + cut.nbytes]
            return await self.queues[cut.directory].run(
                lane, job, self._gate, self.file(cut.directory, name), part, cut.offset,
                after=lambda num_retries: (num_retries, block_digests(part) if hashed else b""),
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
        chunk = self._chunk_nbytes[run.directory]
        return [
            Segment(run.directory, run.offset + start, run.piece_offset + start, min(chunk, run.nbytes - start))
            for start in range(0, run.nbytes, chunk)
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
