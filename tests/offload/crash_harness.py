"""Kills training at random moments and compares what re-opens with an uninterrupted run, bit by bit.

`python -P crash_harness.py NUM_KILLS SEED FOLDER` prints one JSON line. Children are forked from this process,
which has imported torch and computed nothing (torch's thread pools do not survive a fork). Each kill aims at one
phase, in turn:

    fetch   a read from the store is in service
    write   an update's or a copy's write is in service
    flush   a commit is between its data flush and its rename
    after   none of these: computing, or between steps
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offload import AdamW, OffloadConfig, OffloadEngine
from offload.store import Store
from offload.store.commit import Committer

PHASES = ("after", "fetch", "write", "flush")
HOMES = ({"param": "nvme", "states": "nvme", "grad": "nvme"}, {"param": "host", "states": "host", "grad": "host"}, {})
UPDATES = ("auto", "next_forward", "backward", "speculative", "step")
NUM_REFERENCE_STEPS = 150
CHILD_LIMIT_S = 60.0


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList(nn.Sequential(nn.Linear(48, 96), nn.Tanh(), nn.Linear(96, 48)) for _ in range(3))
        self.norm = nn.BatchNorm1d(48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.inner:
            x = x + nn.functional.dropout(block(x), 0.1)
        return self.norm(x).square().mean()


def build(folder: Path, homes: dict[str, str], update: str, *, resume: bool) -> tuple[OffloadEngine, Any]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = OffloadConfig(
        nvme=folder,
        homes=homes,
        host_memory="4MiB",
        device="cpu",
        update=update,
        keep_fp32=["norm.*"],
        resume=resume,
    )
    engine = OffloadEngine(Model(), AdamW(lr=1e-2), config)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(engine.optimizer, 0.999)
    engine.track(scheduler)
    return engine, scheduler


def one_step(engine: OffloadEngine, scheduler: Any) -> None:
    engine.backward(engine(torch.randn(8, 48).bfloat16()))  # random numbers come from the state that a commit keeps
    if scheduler.last_epoch % 3:  # what began in backward is kept in every third step, and taken back in the others
        engine.clip_grad_norm_(0.05)
    engine.step()
    scheduler.step()


def digest(engine: OffloadEngine) -> str:
    """Of masters, moments, step counts, statistics and learning rate."""
    found = hashlib.sha256()
    with engine.gather("*") as parameters:
        for name in sorted(parameters):
            host = parameters[name]
            for tensor in (host.value, *host.states.values()):
                found.update(tensor.numpy().tobytes())
            found.update(f"{name} {host.step}".encode())
    for buffer in engine.module.buffers():
        found.update(buffer.numpy().tobytes())
    found.update(repr(engine.optimizer.param_groups[0]["lr"]).encode())
    return found.hexdigest()


def in_child(work: Callable[[], None]) -> int:
    """Fork; the child runs `work` and leaves without clean-up. Returns its process id."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    return child


def finish(child: int) -> None:
    end_s = time.monotonic() + CHILD_LIMIT_S
    while time.monotonic() < end_s:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            if status:
                raise RuntimeError(f"child ended with status {status}")
            return
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    raise TimeoutError(f"child still ran after {CHILD_LIMIT_S} s")


def reference(folder: Path) -> list[str]:
    """Digest after each step of a run that nobody kills; the same for every placement, so one placement serves."""

    def work() -> None:
        engine, scheduler = build(folder / "reference", HOMES[1], "step", resume=False)
        lines = [digest(engine)]
        for _ in range(NUM_REFERENCE_STEPS):
            one_step(engine, scheduler)
            lines.append(digest(engine))
        (folder / "reference.json").write_text(json.dumps(lines))

    finish(in_child(work))
    return json.loads((folder / "reference.json").read_text())


def marked(shared: mmap.mmap, phase: str, original: Any) -> Any:
    """`original`, an async method, with `phase` shown in shared memory while it is in service."""
    index = PHASES.index(phase)

    async def method(*args: Any, **kwargs: Any) -> Any:
        shared[index] = min(shared[index] + 1, 255)
        try:
            return await original(*args, **kwargs)
        finally:
            shared[index] = max(shared[index] - 1, 0)

    return method


def phase_of(shared: mmap.mmap) -> str:
    for phase in ("flush", "write", "fetch"):
        if shared[PHASES.index(phase)]:
            return phase
    return "after"


def kill_once(
    folder: Path, homes: dict[str, str], update: str, wanted: str, rng: random.Random, shared: mmap.mmap
) -> str:
    """Train in a child and kill it in phase `wanted`. Returns the phase that it really was in."""
    shared[:8] = bytes(8)

    def work() -> None:
        Store.read = marked(shared, "fetch", Store.read)  # type: ignore[method-assign]
        Store.write = marked(shared, "write", Store.write)  # type: ignore[method-assign]
        Committer._make_durable = marked(shared, "flush", Committer._make_durable)  # type: ignore[method-assign]
        engine, scheduler = build(folder, homes, update, resume=False)
        for step in range(NUM_REFERENCE_STEPS):
            one_step(engine, scheduler)
            shared[6], shared[7] = divmod(step + 1, 256)

    child = in_child(work)
    least_steps = rng.randrange(1, 6)
    end_s = time.monotonic() + CHILD_LIMIT_S
    while shared[6] * 256 + shared[7] < least_steps and time.monotonic() < end_s:
        time.sleep(0.0005)
    time.sleep(rng.uniform(0, 0.02))
    give_up_s = time.monotonic() + 0.5
    while phase_of(shared) != wanted and time.monotonic() < give_up_s:
        pass
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        raise RuntimeError(f"the child ended by itself with status {status}")
    return phase_of(shared)


def reopened(folder: Path, homes: dict[str, str], update: str) -> tuple[int, str, str]:
    """Resume in a child: (committed step, its digest, digest one step later)."""

    def work() -> None:
        engine, scheduler = build(folder, homes, update, resume=True)
        step, now = engine.steps_done, digest(engine)
        one_step(engine, scheduler)
        (folder / "reopened.json").write_text(json.dumps([step, now, digest(engine)]))

    finish(in_child(work))
    step, now, later = json.loads((folder / "reopened.json").read_text())
    return step, now, later


def main() -> None:
    num_kills, seed, root = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    rng = random.Random(seed)
    shared = mmap.mmap(-1, 8)
    expected = reference(root)
    phases: Counter[str] = Counter()
    wrong: list[str] = []
    steps: list[int] = []
    for number in range(num_kills):
        wanted = PHASES[number % len(PHASES)]
        # What rests in host memory is never fetched, so a kill in a fetch needs parameters in the store.
        folder, homes = root / f"kill{number}", HOMES[0] if wanted == "fetch" else HOMES[number % len(HOMES)]
        folder.mkdir()
        phase = kill_once(folder, homes, rng.choice(UPDATES), wanted, rng, shared)
        phases[phase] += 1
        step, now, later = reopened(folder, homes, rng.choice(UPDATES))
        steps.append(step)
        if now != expected[step]:
            wrong.append(f"kill {number} in {phase}: step {step} differs")
        if later != expected[step + 1]:
            wrong.append(f"kill {number} in {phase}: the step after {step} differs")
        for file in sorted(folder.rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
    print(json.dumps({"kills": num_kills, "phases": dict(phases), "steps": steps, "wrong": wrong}))


if __name__ == "__main__":
    main()
