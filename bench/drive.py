"""The store beside fio on the same directory in the same run: sequential, random and mixed bandwidth."""

import asyncio
import itertools
import json
import random
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from offload.scheduler.hostmem import allocate_pages
from offload.scheduler.lanes import Lanes
from offload.scheduler.storage import DriveTuning, measure_drive, open_backend
from offload.scheduler.trace import Trace
from offload.store import Extent, Store
from offload.store.checksum import block_digests
from offload.threads import IO_PER_DRIVE

MIB = 1 << 20
Move = Callable[[str, int, Tensor], Coroutine[Any, Any, None]]
LARGE_NBYTES = 32 * MIB  # a piece of the sequential and mixed cases
WINDOW = 4  # pieces under way at once, as a prefetch window keeps them
SMALL_SIZES = (4 << 10, 16 << 10, 64 << 10)
MAX_SMALL = 16384  # pieces of each of these sizes
SMALL_BATCH = 1024  # pieces asked for at once in the random cases
SMALL_WINDOW = 4  # such batches under way at once
SCREEN_S = 0.2  # of each fio configuration; the fastest `NUM_FINALISTS` are then measured by turns with the store
NUM_FINALISTS = 3


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row: the store's bandwidth and fio's best, in 1e9 bytes per second, medians over the rounds."""

    name: str
    store_gb_s: float
    fio_gb_s: float
    fio_best: str
    store_spread: tuple[float, float]
    fio_spread: tuple[float, float]
    target: float

    @property
    def ratio(self) -> float:
        return self.store_gb_s / self.fio_gb_s


def fio_engines(kind: str) -> list[list[str]]:
    """The engines, jobs, depths and block sizes among which fio's best is sought; `kind` is "large" or "random 4k"."""
    sizes = [kind.split()[1]] if kind.startswith("random") else ["128k", "512k", "1m", "4m", "8m"]
    return [
        *(["--ioengine=psync", f"--numjobs={jobs}", f"--bs={size}"] for jobs in (1, 2, 4) for size in sizes),
        *(
            [f"--ioengine={engine}", f"--iodepth={depth}", f"--bs={size}"]
            for engine in ("libaio", "io_uring")
            for depth in (1, 4, 16, 64)
            for size in sizes
        ),
    ]


def fio_gb_s(path: Path, nbytes: int, mode: str, engine: list[str], seconds: float | None) -> float:
    """Bandwidth of one fio run, both directions together; without `seconds` once over the file."""
    jobs = next((int(part.partition("=")[2]) for part in engine if part.startswith("--numjobs=")), 1)
    share = nbytes // jobs  # every job its own part of the file: several that read the same bytes move them once
    command = ["fio", "--name=x", f"--filename={path}", f"--size={share}", f"--offset_increment={share}"]
    command += ["--direct=1", f"--rw={mode}", "--group_reporting", "--thread", "--output-format=json", *engine]
    if seconds is not None:
        command += ["--time_based", f"--runtime={round(seconds * 1000)}ms"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or "{" not in done.stdout:
        raise ValueError(f"fio failed: {(done.stderr or done.stdout).strip()[-300:]}")
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    return (job["read"]["bw_bytes"] + job["write"]["bw_bytes"]) / 1e9


def _measured(directory: Path) -> DriveTuning:
    """What the store's own probe finds here, as a large store does at its first start."""
    folder = directory / "probe"
    folder.mkdir()
    try:
        return measure_drive(open_backend(folder), seconds=4.0, progress=lambda text: None, each=block_digests).tuning
    finally:
        shutil.rmtree(folder)


class StoreRig:
    """A store of one large and three small extents, all pieces written once."""

    def __init__(self, directory: Path, nbytes: int, verify: bool) -> None:
        self.lanes = Lanes(Trace(), num_io_threads=IO_PER_DRIVE)
        self.large = nbytes // LARGE_NBYTES
        self.num_small = {size: min(MAX_SMALL, nbytes // size) for size in SMALL_SIZES}
        extents = [
            Extent(key="large", unit="large", kind="states", piece_nbytes=(LARGE_NBYTES,) * self.large),
            *(
                Extent(key=f"small{size}", unit=f"small{size}", kind="param", piece_nbytes=(size,) * num)
                for size, num in self.num_small.items()
            ),
        ]
        tuning = _measured(directory)
        self.chunk_nbytes, self.depth = tuning.chunk_nbytes, tuning.depth
        self.store = Store.create([directory], extents, {}, self.lanes, verify=verify, overwrite=True, tunings=[tuning])
        self.buffers = [allocate_pages(LARGE_NBYTES) for _ in range(2 * WINDOW)]
        for buffer in self.buffers:
            buffer.random_(0, 256)
        self.small = allocate_pages(SMALL_WINDOW * SMALL_BATCH * max(SMALL_SIZES))

    async def fill(self) -> None:
        for piece in range(self.large):
            await self.store.write("large", piece, self.buffers[0])
        for size, num in self.num_small.items():
            for start in range(0, num, 256):
                part = range(start, min(num, start + 256))
                await asyncio.gather(*(self.store.write(f"small{size}", i, self.buffers[1][:size]) for i in part))

    async def large_gb_s(self, reads: int, writes: int, seconds: float) -> float:
        """`reads` and `writes` pieces under way at once, in the order of the file; in different halves if both are."""
        num = self.large // 2 if reads and writes else self.large

        async def stream(call: Move, buffer: Tensor, first: int, piece: int, step: int) -> None:
            while time.perf_counter() < end_s:
                await call("large", first + piece % num, buffer)
                piece += step

        start_s, before = time.perf_counter(), self._moved()
        end_s = start_s + seconds
        jobs = [stream(self.store.read, self.buffers[i], 0, i, reads) for i in range(reads)]
        jobs += [stream(self.store.write, self.buffers[-1 - i], self.large - num, i, writes) for i in range(writes)]
        await asyncio.gather(*jobs)
        return (self._moved() - before) / (time.perf_counter() - start_s) / 1e9

    async def small_gb_s(self, size: int, seconds: float) -> float:
        """`SMALL_WINDOW` batches of random pieces under way at once, drawn before the clock runs."""
        chance, num = random.Random(0), self.num_small[size]
        parts = self.small[: SMALL_WINDOW * SMALL_BATCH * size].split(size)
        wanted = [
            [
                [(f"small{size}", chance.randrange(num), part) for part in parts[first : first + SMALL_BATCH]]
                for _ in range(8)
            ]
            for first in range(0, len(parts), SMALL_BATCH)
        ]

        async def stream(batches: list[list[tuple[str, int, Tensor]]]) -> None:
            for batch in itertools.cycle(batches):
                if time.perf_counter() >= end_s:
                    break
                await self.store.read_many(batch)

        start_s, before = time.perf_counter(), self._moved()
        end_s = start_s + seconds
        await asyncio.gather(*map(stream, wanted))
        return (self._moved() - before) / (time.perf_counter() - start_s) / 1e9

    def _moved(self) -> int:
        return self.store.read_nbytes + self.store.written_nbytes

    def close(self) -> None:
        self.store.close()
        self.lanes.close()


Measure = Callable[[StoreRig, float], Coroutine[Any, Any, float]]

# By name: fio's mode, which of its engines, the ratio to reach, and how the store is measured.
CASES: dict[str, tuple[str, str, float, Measure]] = {
    "sequential read": ("read", "large", 0.95, lambda rig, seconds: rig.large_gb_s(WINDOW, 0, seconds)),
    "sequential write": ("write", "large", 0.95, lambda rig, seconds: rig.large_gb_s(0, WINDOW, seconds)),
    "mixed": ("rw", "large", 0.90, lambda rig, seconds: rig.large_gb_s(WINDOW, WINDOW, seconds)),
    "random 4 KiB": ("randread", "random 4k", 0.80, lambda rig, seconds: rig.small_gb_s(4 << 10, seconds)),
    "random 16 KiB": ("randread", "random 16k", 0.80, lambda rig, seconds: rig.small_gb_s(16 << 10, seconds)),
    "random 64 KiB": ("randread", "random 64k", 0.80, lambda rig, seconds: rig.small_gb_s(64 << 10, seconds)),
}


def compare(
    directory: Path, *, nbytes: int = 1 << 30, seconds: float = 0.5, rounds: int = 5, verify: bool = True,
    cases: Sequence[str] = tuple(CASES), progress: Callable[[str], None] = print,
) -> list[Case]:  # fmt: skip
    """Measure `cases`, each `rounds` times by turns with fio's finalists, so that both meet the same noise.

    fio's figure is its best finalist's median. Raises: ValueError without fio; OSError if the drive is full.
    """
    if shutil.which("fio") is None:
        raise ValueError("fio is not installed; install it (Debian: apt install fio) to compare with it")
    directory.mkdir(parents=True, exist_ok=True)
    rig = StoreRig(directory, nbytes, verify)
    file = directory / "fio.bin"
    try:
        progress(f"the probe chose requests of {rig.chunk_nbytes >> 20} MiB, {rig.depth} in flight")
        asyncio.run(rig.fill())
        fio_gb_s(file, nbytes, "write", ["--ioengine=psync", "--bs=8m"], None)
        return [_case(name, rig, file, nbytes, seconds, rounds, progress) for name in cases]
    finally:
        rig.close()
        file.unlink(missing_ok=True)


def _case(
    name: str, rig: StoreRig, file: Path, nbytes: int, seconds: float, rounds: int, progress: Callable[[str], None]
) -> Case:
    mode, kind, target, measure = CASES[name]
    screened = {index: fio_gb_s(file, nbytes, mode, engine, SCREEN_S) for index, engine in enumerate(fio_engines(kind))}
    finalists = sorted(screened, key=lambda index: -screened[index])[:NUM_FINALISTS]
    theirs: dict[int, list[float]] = {index: [] for index in finalists}
    ours: list[float] = []
    for _ in range(rounds):
        for index in finalists:
            theirs[index].append(fio_gb_s(file, nbytes, mode, fio_engines(kind)[index], seconds))
            ours.append(asyncio.run(measure(rig, seconds)))
            rig.lanes.trace.drain()
    best = max(theirs, key=lambda index: statistics.median(theirs[index]))
    case = Case(
        name=name,
        store_gb_s=statistics.median(ours),
        fio_gb_s=statistics.median(theirs[best]),
        fio_best=" ".join(part.removeprefix("--") for part in fio_engines(kind)[best]),
        store_spread=(min(ours), max(ours)),
        fio_spread=(min(theirs[best]), max(theirs[best])),
        target=target,
    )
    progress(f"{name}: store {case.store_gb_s:.2f} GB/s, fio {case.fio_gb_s:.2f} GB/s, ratio {case.ratio:.2f}")
    return case
