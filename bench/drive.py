"""The store beside fio on the same directory in the same run: sequential, random and mixed bandwidth."""

import asyncio
import json
import random
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offload.scheduler.hostmem import allocate_pages
from offload.scheduler.lanes import Lanes
from offload.scheduler.storage import DriveTuning, measure_drive, open_backend
from offload.scheduler.trace import Trace
from offload.store import Extent, Store

MIB = 1 << 20
LARGE_NBYTES = 32 * MIB  # a piece of the sequential and mixed cases
WINDOW = 4  # pieces under way at once, as a prefetch window keeps them
SMALL_SIZES = (4 << 10, 16 << 10, 64 << 10)
SMALL_BATCH = 2048  # pieces asked for at once in the random cases


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
    """The engines, depths and block sizes that fio may choose its best from."""
    if kind.startswith("random"):
        size = kind.split()[1]
        return [
            ["--ioengine=psync", "--numjobs=4", f"--bs={size}"],
            *(
                [f"--ioengine={engine}", f"--iodepth={depth}", f"--bs={size}"]
                for engine in ("libaio", "io_uring")
                for depth in (16, 64)
            ),
        ]
    return [
        ["--ioengine=psync", "--numjobs=1", "--bs=8m"],
        ["--ioengine=psync", "--numjobs=4", "--bs=1m"],
        ["--ioengine=psync", "--numjobs=4", "--bs=8m"],
        ["--ioengine=libaio", "--iodepth=4", "--bs=1m"],
        ["--ioengine=libaio", "--iodepth=16", "--bs=128k"],
        ["--ioengine=libaio", "--iodepth=64", "--bs=1m"],
        ["--ioengine=io_uring", "--iodepth=16", "--bs=1m"],
    ]


def fio_gb_s(path: Path, nbytes: int, mode: str, engine: list[str], seconds: float) -> float:
    """Bandwidth of one fio run, both directions together."""
    command = ["fio", "--name=x", f"--filename={path}", f"--size={nbytes}", "--direct=1", f"--rw={mode}"]
    command += ["--time_based", f"--runtime={seconds}", "--group_reporting", "--thread"]
    command += ["--output-format=json", *engine]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"fio failed: {(done.stderr or done.stdout).strip()[-300:]}")
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    return (job["read"]["bw_bytes"] + job["write"]["bw_bytes"]) / 1e9


def _num_small(nbytes: int, size: int) -> int:
    return min(16384, nbytes // size)


def _measured(directory: Path) -> DriveTuning:
    """What the store's own probe finds here, as a large store does at its first start."""
    folder = directory / "probe"
    folder.mkdir()
    try:
        return measure_drive(open_backend(folder), seconds=4.0, progress=lambda text: None).tuning
    finally:
        shutil.rmtree(folder)


class StoreRig:
    """A store of one large and three small extents, all pieces written once."""

    def __init__(self, directory: Path, nbytes: int, verify: bool) -> None:
        self.lanes = Lanes(Trace())
        self.large = nbytes // LARGE_NBYTES
        small = [
            Extent(
                key=f"small{size}", unit=f"small{size}", kind="param", piece_nbytes=(size,) * min(16384, nbytes // size)
            )
            for size in SMALL_SIZES
        ]
        extents = [
            Extent(key="large", unit="large", kind="states", piece_nbytes=(LARGE_NBYTES,) * self.large),
            *small,
        ]
        tuning = _measured(directory)
        self.chunk_nbytes, self.depth = tuning.chunk_nbytes, tuning.depth
        self.store = Store.create([directory], extents, {}, self.lanes, verify=verify, overwrite=True, tunings=[tuning])
        self.num_small = {size: len(extent.piece_nbytes) for size, extent in zip(SMALL_SIZES, small, strict=True)}
        self.buffers = [allocate_pages(LARGE_NBYTES) for _ in range(2 * WINDOW)]
        for buffer in self.buffers:
            buffer.random_(0, 256)

    async def fill(self) -> None:
        for piece in range(self.large):
            await self.store.write("large", piece, self.buffers[0])
        for size, num in self.num_small.items():
            for start in range(0, num, 256):
                part = range(start, min(num, start + 256))
                await asyncio.gather(*(self.store.write(f"small{size}", i, self.buffers[1][:size]) for i in part))

    async def large_gb_s(self, reads: int, writes: int, seconds: float) -> float:
        """`reads` and `writes` pieces under way at once, in the order of the file."""
        start_s, before = time.perf_counter(), self._moved()
        half = self.large // 2

        async def stream(index: int, call: Callable[..., Coroutine[Any, Any, None]], first: int, step: int) -> None:
            turn = 0
            while time.perf_counter() - start_s < seconds:
                await call(
                    "large", first + (index + turn * step) % half, self.buffers[index if first == 0 else -1 - index]
                )
                turn += 1

        jobs = [stream(index, self.store.read, 0, reads) for index in range(reads)]
        jobs += [stream(index, self.store.write, half, writes) for index in range(writes)]
        await asyncio.gather(*jobs)
        return (self._moved() - before) / (time.perf_counter() - start_s) / 1e9

    async def small_gb_s(self, size: int, seconds: float) -> float:
        chance, num = random.Random(0), self.num_small[size]
        buffer = allocate_pages(SMALL_BATCH * size)
        buffers = [buffer[i * size : (i + 1) * size] for i in range(SMALL_BATCH)]
        start_s, before = time.perf_counter(), self._moved()
        while time.perf_counter() - start_s < seconds:
            await self.store.read_many([(f"small{size}", chance.randrange(num), part) for part in buffers])
        return (self._moved() - before) / (time.perf_counter() - start_s) / 1e9

    def _moved(self) -> int:
        return self.store.read_nbytes + self.store.written_nbytes

    def close(self) -> None:
        self.store.close()
        self.lanes.close()


def compare(
    directory: Path, *, nbytes: int = 1 << 30, seconds: float = 1.0, rounds: int = 3, verify: bool = True,
    progress: Callable[[str], None] = print,
) -> list[Case]:  # fmt: skip
    """Measure everything `rounds` times, fio and the store by turns, so that both meet the same noise.

    fio's figure is its best engine's median. Raises: ValueError without fio; OSError if the drive is full.
    """
    if shutil.which("fio") is None:
        raise ValueError("fio is not installed; install it (Debian: apt install fio) to compare with it")
    directory.mkdir(parents=True, exist_ok=True)
    rig = StoreRig(directory, nbytes, verify)
    file = directory / "fio.bin"
    try:
        progress(f"the probe chose requests of {rig.chunk_nbytes >> 20} MiB, {rig.depth} in flight")
        asyncio.run(rig.fill())
        fio_gb_s(file, nbytes, "write", ["--ioengine=psync", "--bs=8m", "--time_based=0"], 60)
        cases = [
            ("sequential read", "read", "large", 0.95, lambda: rig.large_gb_s(WINDOW, 0, seconds)),
            ("sequential write", "write", "large", 0.95, lambda: rig.large_gb_s(0, WINDOW, seconds)),
            ("mixed", "rw", "large", 0.90, lambda: rig.large_gb_s(WINDOW, WINDOW, seconds)),
            *(
                (f"random {size >> 10} KiB", "randread", f"random {size >> 10}k", 0.80,
                 lambda size=size: rig.small_gb_s(size, seconds))
                for size in SMALL_SIZES
            ),
        ]  # fmt: skip
        return [
            _case(name, target, file, nbytes, mode, fio_engines(kind), measure, seconds, rounds, progress)
            for name, mode, kind, target, measure in cases
        ]
    finally:
        rig.close()
        file.unlink(missing_ok=True)


def _case(
    name: str, target: float, file: Path, nbytes: int, mode: str, engines: list[list[str]],
    measure: Callable[[], Coroutine[Any, Any, float]], seconds: float, rounds: int, progress: Callable[[str], None],
) -> Case:  # fmt: skip
    theirs: dict[int, list[float]] = {index: [] for index in range(len(engines))}
    ours: list[float] = []
    for _ in range(rounds):
        for index, engine in enumerate(engines):
            theirs[index].append(fio_gb_s(file, nbytes, mode, engine, seconds))
            ours.append(asyncio.run(measure()))
    best = max(theirs, key=lambda index: statistics.median(theirs[index]))
    case = Case(
        name=name,
        store_gb_s=statistics.median(ours),
        fio_gb_s=statistics.median(theirs[best]),
        fio_best=" ".join(part.removeprefix("--") for part in engines[best]),
        store_spread=(min(ours), max(ours)),
        fio_spread=(min(theirs[best]), max(theirs[best])),
        target=target,
    )
    progress(f"{name}: store {case.store_gb_s:.2f} GB/s, fio {case.fio_gb_s:.2f} GB/s, ratio {case.ratio:.2f}")
    return case
