"""A run that was closed goes on bit for bit, whatever placement it goes on under; another model's store is refused."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offload import SGD, AdamW, OffloadConfig, OffloadEngine
from offload.store import Store, StoreError, StoreExists, StoreMismatch

ALL_NVME = {"param": "nvme", "states": "nvme", "grad": "nvme"}
ALL_HOST = {"param": "host", "states": "host", "grad": "host"}
MIXED = {"param": "host", "states": "nvme", "grad": "host"}


class Net(nn.Module):
    def __init__(self, width: int = 32, depth: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.Tanh(), nn.Dropout(0.2), nn.Linear(2 * width, width))
            for _ in range(depth)
        )
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.norm(x.float()).square().mean() + x.float().pow(4).mean()


def build(folder: Path, *, seed: int = 0, width: int = 32, spec: Any = None, **settings: Any) -> OffloadEngine:
    torch.manual_seed(seed)
    config = {"host_memory": "16MiB", "device": "cpu", "keep_fp32": ["norm.*"], "dtype": torch.bfloat16, **settings}
    return OffloadEngine(Net(width), spec or AdamW(lr=1e-2), OffloadConfig(nvme=folder, **config))


def schedule(engine: OffloadEngine) -> torch.optim.lr_scheduler.LRScheduler:
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(engine.optimizer, 20)
    engine.track(scheduler)
    return scheduler


def train(engine: OffloadEngine, scheduler: Any, num_steps: int) -> list[float]:
    """Losses of steps whose data and dropout come from torch's generator, and whose noise comes from Python's."""
    losses = []
    for _ in range(num_steps):
        engine.backward(engine((torch.randn(16, 32) * (1 + random.random())).to(engine.config.dtype)))
        losses.append(engine.step().loss)
        scheduler.step()
    return losses


def snapshot(engine: OffloadEngine) -> dict[str, Tensor]:
    with engine.gather("*") as parameters:
        found = {name: host.value.clone() for name, host in parameters.items()}
        for name, host in parameters.items():
            found.update({f"{name}/{kind}": state.clone() for kind, state in host.states.items()})
            found[f"{name}/step"] = torch.tensor(host.step)
    found.update({f"buffer {name}": buffer.clone() for name, buffer in engine.module.named_buffers()})
    return found


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("before", [ALL_NVME, ALL_HOST, MIXED], ids=["nvme", "host", "mixed"])
@pytest.mark.parametrize("after", [ALL_NVME, ALL_HOST, MIXED], ids=["nvme", "host", "mixed"])
def test_resume_is_bit_identical(tmp_path: Path, dtype: torch.dtype, before: Any, after: Any) -> None:
    random.seed(7)
    with build(tmp_path / "whole", dtype=dtype, homes=MIXED) as engine:
        scheduler = schedule(engine)
        expected = train(engine, scheduler, 7)
        final = snapshot(engine)
        lr = engine.optimizer.param_groups[0]["lr"]
    random.seed(7)
    with build(tmp_path / "cut", dtype=dtype, homes=before) as engine:
        losses = train(engine, schedule(engine), 3)
    random.seed(99)
    with build(tmp_path / "cut", seed=5, dtype=dtype, homes=after, resume=True) as engine:
        assert engine.steps_done == 3
        losses += train(engine, schedule(engine), 4)
        assert losses == expected
        assert_same(snapshot(engine), final)
        assert engine.optimizer.param_groups[0]["lr"] == lr
        assert engine.flush() is None
        assert engine.steps_done == 7


def test_a_step_is_durable_once_the_engine_is_entered_again(tmp_path: Path) -> None:
    with build(tmp_path) as engine:
        scheduler = schedule(engine)
        assert engine.steps_done == 0
        train(engine, scheduler, 1)
        engine.flush()
        assert engine.steps_done == 1
        train(engine, scheduler, 2)
        deadline = time.monotonic() + 20
        while engine.steps_done < 2 and time.monotonic() < deadline:  # step 2 is committed behind what follows it
            time.sleep(0.01)
        assert engine.steps_done == 2  # step 3 waits for its scheduler
        engine.flush()
        assert engine.steps_done == 3


def test_every_third_step_is_kept(tmp_path: Path) -> None:
    with build(tmp_path, durability=3, homes=ALL_NVME) as engine:
        scheduler = schedule(engine)
        done = []
        for _ in range(8):
            train(engine, scheduler, 1)
            done.append(engine.steps_done)
        assert set(done) <= {0, 3, 6}
        assert done[4] == 3
        assert done[7] == 6
        engine.flush()
        assert engine.steps_done == 8


def test_a_run_that_dies_resumes_at_the_last_kept_step(tmp_path: Path) -> None:
    random.seed(1)
    engine = build(tmp_path / "a", durability=2)
    scheduler = schedule(engine)
    losses = train(engine, scheduler, 5)
    engine._log = None  # what a crash leaves: no last commit
    engine.close()
    random.seed(2)
    with build(tmp_path / "a", durability=2, resume=True) as engine:
        assert engine.steps_done == 4
        assert train(engine, schedule(engine), 1) == losses[4:]


def test_without_durability_nothing_can_be_resumed(tmp_path: Path) -> None:
    with build(tmp_path, durability="none") as engine:
        train(engine, schedule(engine), 1)
        assert engine.steps_done == 1
    with pytest.raises(StoreError):
        build(tmp_path, resume=True)
    build(tmp_path, durability="none").close()  # and its place may be taken


def test_a_resumable_run_is_not_overwritten_unasked(tmp_path: Path) -> None:
    build(tmp_path).close()
    with pytest.raises(StoreExists, match=r"resume=True.*overwrite=True"):
        build(tmp_path)
    build(tmp_path, overwrite=True).close()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"width": 48}, "blocks.0.0.weight"),
        ({"spec": SGD(lr=0.1, momentum=0.9)}, "optimizer"),
        ({"dtype": torch.float32}, "blocks.0.0.weight"),
    ],
    ids=["model", "optimizer", "dtype"],
)
def test_another_run_is_refused_with_the_difference(tmp_path: Path, settings: dict[str, Any], named: str) -> None:
    build(tmp_path).close()
    with pytest.raises(StoreMismatch, match=named):
        build(tmp_path, resume=True, **settings)
    with build(tmp_path, resume=True) as engine:  # the refusal has changed nothing
        assert engine.steps_done == 0


def test_bytes_of_a_durable_step_with_parameters_in_memory(tmp_path: Path) -> None:
    """Sh: states 10 + 10 bytes per parameter; durable, the 16-bit parameters are written too: 10 + 12."""
    for durability, written in (("none", 10), ("step", 12)):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(256, 512, bias=False), nn.Linear(512, 256, bias=False))
        numel = 2 * 256 * 512
        config = OffloadConfig(
            nvme=tmp_path / durability, homes=MIXED, host_memory="16MiB", device="cpu", durability=durability
        )
        with OffloadEngine(module, AdamW(), config) as engine:
            for _ in range(2):
                engine.backward(engine(torch.randn(4, 256).bfloat16()).float().square().mean())
                engine.step()
            engine.flush()
            engine.backward(engine(torch.randn(4, 256).bfloat16()).float().square().mean())
            before = engine._parts.store.statistics()
            engine.step()
            engine.flush()
            after = engine._parts.store.statistics()
        assert (after.read_nbytes - before.read_nbytes) / numel == 10
        assert (after.written_nbytes - before.written_nbytes) / numel == written


def test_tracking_needs_a_state(tmp_path: Path) -> None:
    with build(tmp_path) as engine, pytest.raises(TypeError, match="state_dict"):
        engine.track(object())


@pytest.mark.parametrize(
    "settings",
    [
        {"durability": "sometimes"},
        {"durability": 0},
        {"resume": True},
        {"resume": True, "nvme": "x", "overwrite": True},
        {"resume": True, "nvme": "x", "durability": "none"},
        {"rated_endurance": "much"},
    ],
)
def test_settings_that_contradict_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"durability|resume|rated_endurance"):
        OffloadConfig(**settings)


def test_a_skipped_step_does_not_overtake_the_commit_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy of step 1 is slow; step 2 changes nothing, has nothing to copy and must still be sealed after step 1."""
    write = Store.write

    async def slow_write(self: Store, key: str, piece: int, buffer: Tensor, **settings: Any) -> None:
        if settings:  # copies of what rests in host memory say how soon they are needed
            await asyncio.sleep(0.05)
        await write(self, key, piece, buffer, **settings)

    engine = build(tmp_path, homes=ALL_HOST, dtype=torch.float32)
    scheduler = schedule(engine)
    monkeypatch.setattr(Store, "write", slow_write)
    train(engine, scheduler, 1)
    expected = snapshot(engine)
    engine.backward(engine(torch.full((16, 32), float("nan"))))
    assert engine.step().skipped
    engine.eval()
    with torch.no_grad():
        engine(torch.zeros(16, 32))  # enters the engine: step 2 is launched
    engine._log.settle()
    assert engine.steps_done == 2
    engine._log = None  # a crash
    engine.close()
    monkeypatch.undo()
    with build(tmp_path, homes=ALL_HOST, dtype=torch.float32, resume=True) as engine:
        found = snapshot(engine)
        assert engine.steps_done == 2
        assert [n for n in expected if "buffer" not in n and not torch.equal(found[n], expected[n])] == []


class Cursor:
    """A loader: where it is in the data is its state, and it is asked for a batch before the engine is entered."""

    def __init__(self) -> None:
        self.position = 0

    def draw(self) -> Tensor:
        self.position += 1
        return torch.randn(16, 32, generator=torch.Generator().manual_seed(self.position))

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def cursor_run(engine: OffloadEngine, num_steps: int, stop_after: int | None = None) -> list[tuple[float, float]]:
    """(loss, lr) of each step; stops between step() and the scheduler's after `stop_after` steps."""
    cursor = Cursor()
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(engine.optimizer, 20)
    engine.track(scheduler, cursor)
    history = []
    for number in range(num_steps):
        batch = cursor.draw()
        engine.backward(engine(batch))
        info = engine.step()
        history.append((info.loss, info.lr))
        if number + 1 == stop_after:
            raise KeyboardInterrupt
        scheduler.step()
    return history


@pytest.mark.parametrize("end", ["killed", "interrupted"])
def test_loader_and_scheduler_go_on_where_the_step_was(tmp_path: Path, end: str) -> None:
    fp32 = {"dtype": torch.float32}
    with build(tmp_path / "whole", **fp32) as engine:
        expected = cursor_run(engine, 8)
    if end == "killed":
        engine = build(tmp_path / "cut", **fp32)
        cursor_run(engine, 4)
        engine.flush()
        engine._log = None  # a crash
        engine.close()
        done = 4
    else:
        with pytest.raises(KeyboardInterrupt), build(tmp_path / "cut", **fp32) as engine:
            cursor_run(engine, 8, stop_after=4)
        done = 3  # the fourth step's scheduler never stepped, so the third is the last whole one
    with build(tmp_path / "cut", resume=True, **fp32) as engine:
        assert engine.steps_done == done
        assert cursor_run(engine, 8 - done) == expected[done:]
