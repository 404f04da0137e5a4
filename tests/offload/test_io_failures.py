"""A drive that fails under the engine: the right exception, no hang, and the last committed step intact."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offload import AdamW, EngineFailed, OffloadConfig, OffloadEngine
from offload.scheduler.storage import OffloadIOError, open_backend
from offload.scheduler.storage.faults import Fault, FaultyBackend
from offload.store import ChecksumError, Store

ALL_NVME = {"param": "nvme", "states": "nvme", "grad": "nvme"}


@pytest.fixture
def drives(monkeypatch: pytest.MonkeyPatch) -> list[FaultyBackend]:
    """The drives of every store made in the test, durable one first; faults may be added at any time."""
    made: list[FaultyBackend] = []
    create = Store.create.__func__  # type: ignore[attr-defined]

    def create_faulty(cls: type[Store], *args: Any, **kwargs: Any) -> Store:
        def backend(root: Path) -> FaultyBackend:
            made.append(FaultyBackend(open_backend(root)))
            return made[-1]

        return create(cls, *args, **{**kwargs, "backend": backend})

    monkeypatch.setattr(Store, "create", classmethod(create_faulty))
    return made


def build(folder: Path, **settings: Any) -> OffloadEngine:
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(3)), nn.Linear(64, 1))
    config = {"homes": ALL_NVME, "host_memory": "1MiB", "device": "cpu", "dtype": torch.float32, **settings}
    return OffloadEngine(module, AdamW(lr=1e-2), OffloadConfig(nvme=folder, **config))


def batch(number: int) -> Tensor:
    return torch.randn(8, 64, generator=torch.Generator().manual_seed(number))


def train(engine: OffloadEngine, first: int, last: int) -> list[float]:
    losses = []
    for number in range(first, last):
        engine.backward(engine(batch(number)).square().mean())
        losses.append(engine.step().loss)
    return losses


@pytest.fixture
def expected(tmp_path: Path) -> list[float]:
    """Losses of ten steps on a healthy drive."""
    engine = build(tmp_path / "healthy")
    losses = train(engine, 0, 10)
    engine.close()
    return losses


@pytest.mark.timeout(60)
@pytest.mark.parametrize("operation", ["read", "write"])
def test_a_passing_error_is_retried(
    tmp_path: Path, expected: list[float], drives: list[FaultyBackend], operation: str
) -> None:
    with build(tmp_path / "run") as engine:
        faults = [Fault(operation=operation, number=errno.EIO, skip=skip) for skip in (0, 5, 20)]
        faults.append(Fault(operation=operation, at_most_nbytes=512, skip=7, times=3))
        for drive in drives:
            drive.faults.extend(faults)
        assert train(engine, 0, 10) == expected
        assert sum(fault.hits for fault in faults) >= 4


@pytest.mark.timeout(60)
@pytest.mark.parametrize("where", ["fetch", "gradient", "update read", "update write", "flush", "manifest"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC], ids=["EIO", "ENOSPC"])
def test_a_lasting_error_is_raised_and_the_committed_step_is_whole(
    tmp_path: Path, expected: list[float], drives: list[FaultyBackend], where: str, number: int
) -> None:
    engine = build(tmp_path / "run")
    assert train(engine, 0, 3) == expected[:3]
    engine.flush()
    durable, scratch = drives
    fault = {
        "fetch": (durable, Fault(operation="read", number=number, times=None)),
        "gradient": (scratch, Fault(operation="write", number=number, times=None)),
        "update read": (scratch, Fault(operation="read", number=number, times=None)),
        "update write": (durable, Fault(operation="write", number=number, times=None, skip=2)),
        "flush": (durable, Fault(operation="flush", number=number, times=None)),
        "manifest": (durable, Fault(operation="rename", number=number, times=None)),
    }[where]
    fault[0].faults.append(fault[1])
    start_s = time.monotonic()
    with pytest.raises((OffloadIOError, RuntimeError, OSError)) as raised:
        train(engine, 3, 6)
        engine.flush()
    assert fault[1].hits > 0
    text = "".join(str(error) for error in (raised.value, raised.value.__cause__, raised.value.__context__) if error)
    assert errno.errorcode[number] in text or os.strerror(number) in text
    assert time.monotonic() - start_s < 30  # a hang is the failure that this looks for
    fault[0].faults.clear()
    try:
        engine.close()
    except RuntimeError as error:  # a store whose commit failed says so again
        assert "intact" in str(error)
    with build(tmp_path / "run", resume=True) as engine:
        done = engine.steps_done
        assert 3 <= done <= 6
        assert train(engine, done, 10) == expected[done:]


@pytest.mark.timeout(60)
def test_an_engine_whose_update_broke_off_says_so(tmp_path: Path, drives: list[FaultyBackend]) -> None:
    engine = build(tmp_path / "run")
    train(engine, 0, 2)
    engine.flush()
    engine.backward(engine(batch(2)).square().mean())
    drives[0].faults.append(Fault(operation="write", number=errno.EIO, times=None, skip=3))
    engine.step()  # decides; the update is made behind it
    with pytest.raises(OffloadIOError):
        engine.flush()
    drives[0].faults.clear()
    for use in (lambda: engine(batch(3)), engine.step, engine.state_dict, engine.flush):
        with pytest.raises(EngineFailed, match="resume=True"):
            use()
    engine.close()
    with build(tmp_path / "run", resume=True) as again:
        assert again.steps_done == 2


@pytest.mark.timeout(60)
def test_a_failed_fetch_leaves_the_engine_usable(
    tmp_path: Path, expected: list[float], drives: list[FaultyBackend]
) -> None:
    with build(tmp_path / "run") as engine:
        losses = train(engine, 0, 2)
        engine.flush()
        fault = Fault(operation="read", number=errno.EIO, times=None)
        drives[0].faults.append(fault)
        engine._loop.run(engine._residency.evict([layout.unit for layout in engine._parts.layouts]))
        with pytest.raises(OffloadIOError, match="EIO"):
            engine(batch(2))
        drives[0].faults.clear()
        assert losses + train(engine, 2, 10) == expected


@pytest.mark.timeout(60)
def test_a_flipped_bit_is_named(tmp_path: Path, drives: list[FaultyBackend]) -> None:
    with build(tmp_path / "run") as engine:
        train(engine, 0, 1)
        engine.flush()
        engine._loop.run(engine._residency.evict([layout.unit for layout in engine._parts.layouts]))
        drives[0].faults.append(Fault(operation="read", flip=True, times=None))
        with pytest.raises(ChecksumError, match=r"0\.0\.weight.*checksum"):
            engine(batch(1))
        drives[0].faults.clear()


@pytest.mark.timeout(60)
def test_a_stall_is_waited_for(tmp_path: Path, expected: list[float], drives: list[FaultyBackend]) -> None:
    with build(tmp_path / "run") as engine:
        stall = threading.Event()
        for operation in ("read", "write"):
            drives[0].faults.append(Fault(operation=operation, stall=stall))
        timer = threading.Timer(2.0, stall.set)
        timer.start()
        assert train(engine, 0, 10) == expected
        timer.join()


@pytest.mark.timeout(60)
def test_a_gradient_that_failed_to_land_is_never_used(
    tmp_path: Path, expected: list[float], drives: list[FaultyBackend]
) -> None:
    with build(tmp_path / "run") as engine:
        losses = train(engine, 0, 2)
        drives[1].faults.append(Fault(operation="write", number=errno.EIO, times=None))
        engine.backward(engine(batch(2)).square().mean())
        for use in (engine.step, lambda: engine.clip_grad_norm_(1.0), engine.step):
            with pytest.raises(OffloadIOError):
                use()
        drives[1].faults.clear()
        engine.optimizer.zero_grad()
        assert losses + train(engine, 2, 10) == expected


@pytest.mark.timeout(60)
def test_a_construction_that_fails_gives_the_values_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    write, count = Store.write, 0

    async def failing(self: Store, *args: Any, **settings: Any) -> None:
        nonlocal count
        count += 1
        if count == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        await write(self, *args, **settings)

    monkeypatch.setattr(Store, "write", failing)
    config = OffloadConfig(nvme=tmp_path, homes=ALL_NVME, host_memory="1MiB", device="cpu")
    with pytest.raises(OSError, match="No space left"):
        OffloadEngine(module, AdamW(), config)
    assert all(torch.equal(parameter, before[name]) for name, parameter in module.named_parameters())
    monkeypatch.undo()
    with OffloadEngine(module, AdamW(), config) as engine:  # nothing was left half-made
        assert torch.equal(engine.state_dict()["0.weight"], before["0.weight"])
