"""Short measurements of a drive through a backend: what the store and the planner need to know."""

from __future__ import annotations

import os
import random
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ..hostmem import allocate_pages
from .backend import ALIGN_NBYTES, Backend, StorageFile
from .drive import MIB, DriveTuning, file_system
from .files import view_of
from .transfer import read_fully, write_fully

PROBE_NAME = ".probe-speed"
FILE_NBYTES = 256 * MIB
CHUNKS = (MIB, 2 * MIB, 4 * MIB)
DEPTHS = (4, 8)  # with fewer in flight a drive idles whenever a thread is late, and a short measurement may miss that
NUM_ROUNDS = 3  # every candidate is measured so often, by turns: a shared drive's speed changes from second to second
TOLERANCE = 0.03  # the noise of a short measurement; small requests and few in flight win only within it


@dataclass(frozen=True, kw_only=True)
class ProbeReport:
    """What was measured of one directory. Bandwidths in 1e9 bytes per second, times in seconds.

    Attributes:
        mixed_gb_s: reads and writes together, half of the threads each; the sum of both directions.
        read_latency_s: median of single 4 KiB reads, one at a time.
        flush_s: median time of a flush after one 4 KiB write.
        chunk_nbytes, depth: the best found, of `CHUNKS` and `DEPTHS`.
        align_nbytes: smallest alignment that direct I/O took here, None where there is no direct I/O.
    """

    path: str
    file_system: str
    direct: bool
    align_nbytes: int | None
    free_nbytes: int
    read_gb_s: float
    write_gb_s: float
    mixed_gb_s: float
    read_latency_s: float
    flush_s: float
    chunk_nbytes: int
    depth: int

    @property
    def tuning(self) -> DriveTuning:
        return DriveTuning(
            chunk_nbytes=self.chunk_nbytes, depth=self.depth, read_gb_s=self.read_gb_s, write_gb_s=self.write_gb_s
        )


def measure_drive(
    backend: Backend, *, seconds: float = 3.0, file_nbytes: int = FILE_NBYTES, progress: Callable[[str], None] = print,
    each: Callable[[memoryview], object] | None = None,
) -> ProbeReport:  # fmt: skip
    """Measure the drive under `backend` for about `seconds` and as much again to write the file. Blocks.

    `each` is called with the bytes of every request while chunk and depth are chosen, in the thread that moved them:
    what the user of the drive does there (checksums) is part of what is to be overlapped.

    The file is written in full before anything is timed (a first write to reserved space is slower than all later
    ones) and removed at the end. Raises: NoSpace if `file_nbytes` do not fit; OffloadIOError if the drive fails.
    """
    backend.remove(PROBE_NAME)
    backend.reserve(PROBE_NAME, file_nbytes)
    file = backend.open(PROBE_NAME)
    try:
        progress(f"writing {file_nbytes / MIB:.0f} MiB")
        fill(file, file_nbytes)
        candidates = [(chunk_nbytes, depth) for chunk_nbytes in CHUNKS for depth in DEPTHS]
        slot_s = seconds / (2 * NUM_ROUNDS * len(candidates) + 6)
        seen: dict[tuple[int, int], list[tuple[float, float]]] = {place: [] for place in candidates}
        for _ in range(NUM_ROUNDS):
            for chunk_nbytes, depth in candidates:
                read, write = (
                    rate(
                        file, file_nbytes, chunk_nbytes, reads=depth * (1 - way), writes=depth * way, seconds=slot_s,
                        each=each,
                    )
                    for way in (0, 1)
                )  # fmt: skip
                seen[chunk_nbytes, depth].append((read, write))
        rates = {place: tuple(map(statistics.median, zip(*pairs, strict=True))) for place, pairs in seen.items()}
        chunk_nbytes, depth = best(rates)
        read_gb_s, write_gb_s = (
            rate(file, file_nbytes, chunk_nbytes, reads=depth * (1 - way), writes=depth * way, seconds=2 * slot_s)
            for way in (0, 1)
        )
        half = max(1, depth // 2)
        mixed_gb_s = rate(file, file_nbytes, chunk_nbytes, reads=half, writes=half, seconds=2 * slot_s)
        return ProbeReport(
            path=str(backend.root),
            file_system="memory" if backend.volatile else file_system(backend.root),
            direct=backend.direct,
            align_nbytes=alignment(file) if backend.direct else None,
            free_nbytes=backend.free_nbytes() + file_nbytes,
            read_gb_s=read_gb_s,
            write_gb_s=write_gb_s,
            mixed_gb_s=mixed_gb_s,
            read_latency_s=_latency_s(file, file_nbytes),
            flush_s=_flush_s(file),
            chunk_nbytes=chunk_nbytes,
            depth=depth,
        )
    finally:
        file.close()
        backend.remove(PROBE_NAME)


def best(rates: dict[tuple[int, int], tuple[float, ...]]) -> tuple[int, int]:
    """The (chunk, depth) whose combined rate 2 / (1/read + 1/write) is highest.

    Within `TOLERANCE` of the best the smaller chunk and then the smaller depth win: what is in flight must end before
    anything more urgent can start.
    """

    def combined(place: tuple[int, int]) -> float:
        return 2 / sum(1 / max(speed, 1e-9) for speed in rates[place])

    top = max(map(combined, rates))
    return min(place for place in rates if combined(place) >= (1 - TOLERANCE) * top)


def fill(file: StorageFile, file_nbytes: int) -> None:
    """Write the whole file once with noise (a drive may store zeros without storing them)."""
    block = view_of(allocate_pages(min(8 * MIB, file_nbytes)))
    block[:] = random.Random(0).randbytes(len(block))
    for offset in range(0, file_nbytes, len(block)):
        write_fully(file, block[: min(len(block), file_nbytes - offset)], offset)
    file.flush()


def rate(
    file: StorageFile, file_nbytes: int, chunk_nbytes: int, *, reads: int, writes: int, seconds: float,
    in_order: bool = True, clock: Callable[[], float] = time.perf_counter,
    each: Callable[[memoryview], object] | None = None,
) -> float:  # fmt: skip
    """Bandwidth in GB/s of `reads` reading and `writes` writing threads for `seconds`, at least one request each."""
    num_chunks = file_nbytes // chunk_nbytes
    start, moved, lock = threading.Barrier(reads + writes + 1), [0], threading.Lock()
    end_s = [0.0]

    def work(index: int, transfer: Callable[[StorageFile, memoryview, int], int]) -> None:
        buffer = view_of(allocate_pages(chunk_nbytes))
        buffer[:] = random.Random(index).randbytes(min(chunk_nbytes, MIB)) * max(1, chunk_nbytes // MIB)
        chance, place, done = random.Random(index), index * num_chunks // max(1, reads + writes), 0
        start.wait()
        while not done or clock() < end_s[0]:  # a thread that a busy machine starts late still measures something
            place = (place + 1) % num_chunks if in_order else chance.randrange(num_chunks)
            transfer(file, buffer, place * chunk_nbytes)
            if each is not None:
                each(buffer)
            done += chunk_nbytes
        with lock:
            moved[0] += done

    with ThreadPoolExecutor(reads + writes) as executor:
        kinds = [read_fully] * reads + [write_fully] * writes
        jobs = [executor.submit(work, index, transfer) for index, transfer in enumerate(kinds)]
        end_s[0] = clock() + seconds + 0.001
        begin_s = clock()
        start.wait()
        for job in jobs:
            job.result()
        return moved[0] / (clock() - begin_s) / 1e9


def alignment(file: StorageFile) -> int:
    """Smallest power of two from 512 that a read may be aligned to, 4096 if nothing smaller works."""
    direct = getattr(file, "_direct", None)
    if direct is not None:
        for nbytes in (512, 1024, 2048):
            try:
                os.preadv(direct, [view_of(allocate_pages(ALIGN_NBYTES))[:nbytes]], nbytes)
                return nbytes
            except OSError:
                continue
    return ALIGN_NBYTES


def _latency_s(file: StorageFile, file_nbytes: int, num_reads: int = 64) -> float:
    buffer, chance, times = view_of(allocate_pages(ALIGN_NBYTES)), random.Random(7), []
    for _ in range(num_reads):
        offset = chance.randrange(file_nbytes // ALIGN_NBYTES) * ALIGN_NBYTES
        start_s = time.perf_counter()
        read_fully(file, buffer, offset)
        times.append(time.perf_counter() - start_s)
    return statistics.median(times)


def _flush_s(file: StorageFile, num_flushes: int = 8) -> float:
    buffer, times = view_of(allocate_pages(ALIGN_NBYTES)), []
    for index in range(num_flushes):
        write_fully(file, buffer, index * ALIGN_NBYTES)
        start_s = time.perf_counter()
        file.flush()
        times.append(time.perf_counter() - start_s)
    return statistics.median(times)
