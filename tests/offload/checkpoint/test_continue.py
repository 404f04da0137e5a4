"""10 steps, a checkpoint, another placement, 10 more steps: the bits of 20 uninterrupted ones, also when killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from offload.store import Store

HARNESS = Path(__file__).with_name("run_part.py")
PAIRS = [("memory", "nvme"), ("nvme", "fake"), ("mixed", "memory"), ("fake", "step"), ("step", "mixed")]


@pytest.fixture(scope="module")
def uninterrupted(runs: SimpleNamespace) -> dict[torch.dtype, tuple[list[float], dict[str, torch.Tensor]]]:
    found = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in every test; this is made before the first of them
    for dtype in (torch.bfloat16, torch.float32):
        engine = runs.build(dtype=dtype, device="cpu")
        runs.seed_all(4)
        losses = runs.train(engine, 20)
        found[dtype] = losses, runs.snapshot(engine)
        engine.close()
    torch.set_num_threads(threads)
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("before", "after"), PAIRS)
@pytest.mark.parametrize("background", [False, True], ids=["waiting", "background"])
def test_a_resumed_run_is_the_uninterrupted_one(
    runs: SimpleNamespace,
    uninterrupted: Any,
    tmp_path: Path,
    dtype: torch.dtype,
    before: str,
    after: str,
    background: bool,
) -> None:
    expected, final = uninterrupted[dtype]
    with runs.build(dtype=dtype, **runs.placements(tmp_path / "before")[before]) as engine:
        runs.seed_all(4)
        losses = runs.train(engine, 10)
        path = engine.save(tmp_path / "run", data={"batches": 20}, background=background)
        assert runs.train(engine, 2) == expected[10:12]  # what the checkpoint must not hold
    assert path == tmp_path / "run" / "step-000010"
    runs.seed_all(77)
    with runs.build(seed=5, dtype=dtype, **runs.placements(tmp_path / "after")[after]) as engine:
        resumed = engine.resume(tmp_path / "run")
        assert (resumed.path, resumed.step, resumed.data) == (path, 10, {"batches": 20})
        losses += runs.train(engine, 10)
        assert losses == expected
        assert runs.differing(runs.snapshot(engine), final) == []


def test_an_fp32_run_goes_on_from_masters_of_a_bf16_run(runs: SimpleNamespace, tmp_path: Path) -> None:
    """The dtype decides only how masters are kept: every bit of them, and of the moments, travels both ways."""
    with runs.build(dtype=torch.bfloat16, device="cpu") as engine:
        runs.train(engine, 3)
        engine.save(tmp_path)
        expected = runs.snapshot(engine)
    with runs.build(seed=1, dtype=torch.float32, device="cpu") as engine:
        engine.resume(tmp_path)
        assert runs.differing(runs.snapshot(engine), expected) == []
        engine.save(tmp_path / "again")
    with runs.build(seed=2, dtype=torch.bfloat16, device="cpu") as engine:
        engine.resume(tmp_path / "again")
        assert runs.differing(runs.snapshot(engine), expected) == []


def test_a_resumed_step_is_a_commit_of_a_durable_store(runs: SimpleNamespace, tmp_path: Path) -> None:
    with runs.build(device="cpu") as engine:
        runs.seed_all(4)
        runs.train(engine, 3)
        engine.save(tmp_path / "run")
        expected = runs.train(engine, 2)
    settings = {"nvme": tmp_path / "nvme", "homes": runs.NVME, "device": "cpu", "host_memory": "16MiB"}
    with runs.build(seed=1, **settings) as engine:
        engine.resume(tmp_path / "run")
        assert engine.steps_done == 3
        engine._log = None  # as a crash leaves it: nothing is committed any more
    with runs.build(seed=2, resume=True, **settings) as engine:
        assert engine.steps_done == 3
        assert runs.train(engine, 2) == expected


def test_a_store_that_is_ahead_is_not_taken_back(runs: SimpleNamespace, tmp_path: Path) -> None:
    settings = {"nvme": tmp_path / "nvme", "homes": runs.NVME, "device": "cpu", "host_memory": "16MiB"}
    with runs.build(**settings) as engine:
        runs.train(engine, 2)
        engine.save(tmp_path / "run")
        runs.train(engine, 1)
        with pytest.raises(ValueError, match=r"is of step 2, and the store has committed step 3.*overwrite=True"):
            engine.resume(tmp_path / "run")
        runs.train(engine, 1)  # nothing has happened
    with runs.build(device="cpu") as engine:  # without a store it may go back
        runs.train(engine, 3)
        engine.resume(tmp_path / "run")
        assert engine.steps_done == 2


def test_objects_get_their_states_before_or_after_resume(runs: SimpleNamespace, tmp_path: Path) -> None:
    class Position:
        def __init__(self) -> None:
            self.at = 0

        def state_dict(self) -> dict[str, int]:
            return {"at": self.at}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.at = state["at"]

    with runs.build(device="cpu") as engine:
        early, late = Position(), Position()
        engine.track(early, late)
        early.at, late.at = 3, 4
        runs.train(engine, 1)
        engine.save(tmp_path)
    with runs.build(device="cpu") as engine:
        early, late = Position(), Position()
        engine.track(early)
        engine.resume(tmp_path)
        engine.track(late)
        assert (early.at, late.at) == (3, 4)
        assert engine.scheduler.last_epoch == 1
        engine.track(Position())
        with pytest.raises(ValueError, match=r"no state of Position, which this run tracks"):
            engine.resume(tmp_path)


def test_a_checkpoint_in_the_middle_of_a_step_is_refused(runs: SimpleNamespace, tmp_path: Path) -> None:
    with runs.build(device="cpu") as engine:
        engine.backward(engine(torch.randn(4, 32).bfloat16()))
        with pytest.raises(RuntimeError, match="in the middle of a step"):
            engine.save(tmp_path)
        assert not list(tmp_path.iterdir())
        engine.optimizer.zero_grad()
        engine.save(tmp_path)


# -- processes


def part(*args: str, wait: bool = True) -> Any:
    """Run a part of the run in a process of its own; see `run_part.py`."""
    command = [sys.executable, "-P", str(HARNESS), *args]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if not wait:
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def kill_while_saving(folder: Path, delay_s: float) -> None:
    """Train, save step 10, and die `delay_s` after further saves have begun; go on in another process, and compare."""
    losses, digest = part("whole", str(folder / "whole"))
    child = part("until_killed", str(folder), wait=False)
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith("saving step 12"):
            break
    time.sleep(delay_s)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    last, resumed_digest = part("rest", str(folder))
    assert 1 <= len(last) <= 10
    assert last == losses[-len(last) :]
    assert resumed_digest == digest


def test_new_process_after_a_killed_one(tmp_path: Path) -> None:
    kill_while_saving(tmp_path, 0.01)


@pytest.mark.slow
@pytest.mark.parametrize("delay_s", [0.0, 0.001, 0.003, 0.02, 0.03, 0.05, 0.1, 0.15, 0.2, 0.5])
def test_killed_at_many_moments(tmp_path: Path, delay_s: float) -> None:
    kill_while_saving(tmp_path, delay_s)


def test_a_failed_load_leaves_an_engine_that_refuses_work(
    runs: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with runs.build(device="cpu") as engine:
        engine.save(tmp_path / "run")
    engine = runs.build(nvme=tmp_path / "nvme", homes=runs.NVME, device="cpu", host_memory="16MiB")
    original, calls = Store.write, []

    async def failing(self: Store, key: str, *args: Any, **kwargs: Any) -> None:
        calls.append(key)
        if len(calls) > 4:
            raise OSError(5, "no more")
        await original(self, key, *args, **kwargs)

    monkeypatch.setattr(Store, "write", failing)
    with pytest.raises(OSError, match="no more"):
        engine.resume(tmp_path / "run")
    with pytest.raises(RuntimeError, match="two different steps"):
        engine(torch.randn(4, 32).bfloat16())
    engine.close()
