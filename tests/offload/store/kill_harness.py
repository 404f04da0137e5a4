"""Kills training on a store at chosen moments, over and over on one directory, and checks what each kill left.

Run as a program: DIRECTORY NUM_KILLS SEED; prints one JSON object. It imports torch, computes nothing, and forks one
child per kill. A child opens the store, compares every bit with an uninterrupted run at the step it finds, and goes on
training until it is killed.
"""

import asyncio
import json
import mmap
import os
import random
import signal
import struct
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import torch

from offload.scheduler.hostmem import allocate_pages
from offload.scheduler.lanes import Lanes
from offload.scheduler.storage import Pace, PacedBackend, open_backend
from offload.scheduler.trace import Trace
from offload.store import Extent, NotResumable, Store, StoreMissing

PHASES = ("fetch", "write", "commit", "after")
MEMBERS = [
    Extent(key=f"u{unit}/{kind}", unit=f"u{unit}", kind=kind, piece_nbytes=(8192, 4096))
    for unit in range(3)
    for kind in ("param", "states")
]
PLACES = [(extent.key, piece, nbytes) for extent in MEMBERS for piece, nbytes in enumerate(extent.piece_nbytes)]
# One request takes about a millisecond, so that every phase of a step is long enough to be hit.
PACE = Pace(read_gb_s=0.05, write_gb_s=0.05, latency_s=0.001, flush_s=0.001, depth=4)


class Board:
    """What a child tells its parent, in shared memory, so that it outlives a SIGKILL."""

    FORMAT = "qqqq"  # phase, step found at open (-1: none), last step whose commit returned, step being committed

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)

    def get(self) -> tuple[int, int, int, int]:
        return struct.unpack_from(self.FORMAT, self._memory)

    def set(self, index: int, value: int) -> None:
        struct.pack_into("q", self._memory, 8 * index, value)


def first_value(place: int, nbytes: int) -> np.ndarray:
    return np.frombuffer(random.Random(place).randbytes(nbytes), dtype=np.uint8).copy()


def next_value(value: np.ndarray, step: int) -> np.ndarray:
    """One step of the arithmetic whose every bit depends on the whole history."""
    return (value * np.uint8(3) + np.uint8(step % 256) + np.roll(value, 1)).astype(np.uint8)


def uninterrupted(step: int) -> list[np.ndarray]:
    """All pieces after `step` steps of a run that nobody kills."""
    values = [first_value(place, nbytes) for place, (_, _, nbytes) in enumerate(PLACES)]
    for done in range(1, step + 1):
        values = [next_value(value, done) for value in values]
    return values


async def read_all(store: Store) -> list[np.ndarray]:
    buffers = [allocate_pages(nbytes) for _, _, nbytes in PLACES]
    jobs = [store.read(key, piece, buffer) for (key, piece, _), buffer in zip(PLACES, buffers, strict=True)]
    await asyncio.gather(*jobs)
    return [buffer.numpy() for buffer in buffers]


async def write_all(store: Store, values: list[np.ndarray]) -> None:
    jobs = []
    for (key, piece, nbytes), value in zip(PLACES, values, strict=True):
        buffer = allocate_pages(nbytes)
        buffer.copy_(torch.from_numpy(value))
        jobs.append(store.write(key, piece, buffer))
    await asyncio.gather(*jobs)


async def train(directories: list[Path], board: Board) -> None:
    lanes = Lanes(Trace())
    options = {"backend": lambda root: PacedBackend(open_backend(root), PACE)}
    try:
        store = Store.reopen(directories, MEMBERS, {"run": 1}, lanes, **options)
        step = store.step
        assert store.extra == {"step": step}
        for place, (got, wanted) in enumerate(zip(await read_all(store), uninterrupted(step), strict=True)):
            assert np.array_equal(got, wanted), f"step {step}: {PLACES[place]} differs from the uninterrupted run"
        board.set(1, step)
    except (StoreMissing, NotResumable):
        store = Store.create(directories, MEMBERS, {"run": 1}, lanes, durability="step", **options)
        step = 0
        await write_all(store, uninterrupted(0))
        await store.commit(0, {"step": 0})
        board.set(1, 0)
        board.set(2, 0)
    while True:
        step += 1
        board.set(0, PHASES.index("fetch"))
        values = await read_all(store)
        board.set(0, PHASES.index("write"))
        await write_all(store, [next_value(value, step) for value in values])
        board.set(3, step)
        board.set(0, PHASES.index("commit"))
        await store.commit(step, {"step": step})
        board.set(2, step)
        board.set(0, PHASES.index("after"))
        await asyncio.sleep(0.003)


def child(directories: list[Path], board: Board) -> None:
    try:
        asyncio.run(train(directories, board))
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def main(directory: Path, num_kills: int, seed: int) -> int:
    chance = random.Random(seed)
    directories = [directory / "a", directory / "b"]
    hits, found, promised, possible = dict.fromkeys(PHASES, 0), [], -1, -1
    for kill in range(num_kills + 1):
        board = Board()
        for index, value in enumerate((-1, -1, promised, possible)):
            board.set(index, value)
        pid = os.fork()
        if pid == 0:
            child(directories, board)
        wanted = PHASES.index(PHASES[kill % 4])
        deadline_s = time.monotonic() + 60
        while board.get()[0] != wanted and time.monotonic() < deadline_s:
            if os.waitpid(pid, os.WNOHANG)[0]:
                print(f"child {kill} ended by itself", file=sys.stderr)
                return 1
            time.sleep(0.0001)
        time.sleep(chance.uniform(0, 0.004))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        phase, opened, promised_now, possible_now = board.get()
        # At most one step more than promised may be found: the one whose commit was under way.
        if kill and not promised <= opened <= max(promised, possible):
            print(f"kill {kill}: found step {opened}, {promised} was promised, {possible} begun", file=sys.stderr)
            return 1
        promised, possible = max(promised_now, opened), possible_now
        if phase >= 0:
            hits[PHASES[phase]] += 1
        found.append(opened)
    print(json.dumps({"hits": hits, "found": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
