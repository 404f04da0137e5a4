"""What a user can get wrong: an error that names value, expectation and mend, and nothing half-created."""

from __future__ import annotations

import errno
import logging
import os
import re
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offload import SGD, AdamW, BudgetTooSmall, OffloadConfig, OffloadEngine

FP32 = {"dtype": torch.float32}


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))


def files_below(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*"))}


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def engine_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("offload")]


def refused(
    model: nn.Module, config: OffloadConfig, error: type[BaseException] | tuple[type[BaseException], ...], *texts: str
) -> str:
    """Building fails with every one of `texts` (patterns) in its message; the model and the threads are as before."""
    before, hooks = weights(model), [dict(m._forward_pre_hooks) for m in model.modules()]
    threads = len(engine_threads())
    with pytest.raises(error) as caught:
        OffloadEngine(model, AdamW(), config)
    message = str(caught.value)
    for text in texts:
        assert re.search(text, message), f"{text!r} not in {message!r}"
    assert all(torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))
    assert [dict(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert all("forward" not in m.__dict__ for m in model.modules())
    assert len(engine_threads()) == threads
    with OffloadEngine(model, AdamW(), OffloadConfig(**FP32)) as engine:  # and it can still be wrapped
        engine.backward(engine(torch.ones(1, 64)).sum())
        engine.step()
    return message


# -- settings


@pytest.mark.parametrize(
    ("settings", "texts"),
    [
        ({"host_memory": "8 gigs"}, [r"host_memory='8 gigs'", r"not a size", r'"8GiB"']),
        ({"host_memory": "-1GiB"}, [r"host_memory='-1GiB'", r"positive"]),
        ({"host_memory": 0}, [r"host_memory=0", r"positive"]),
        ({"host_memory": True}, [r"host_memory=True"]),
        ({"host_memory": 1.5}, [r"host_memory=1.5"]),
        ({"host_memory": None}, [r"host_memory=None"]),
        ({"device_memory": "lots"}, [r"device_memory='lots'", r'"900MB"']),
        ({"dtype": torch.float64}, [r"dtype=torch.float64", r"torch.float16 or torch.float32"]),
        ({"dtype": "bf16"}, [r"dtype='bf16'"]),
        ({"micro_batches": 0}, [r"micro_batches=0", r"int >= 1"]),
        ({"micro_batches": 1.0}, [r"micro_batches=1.0"]),
        ({"clip_grad_norm": 0.0}, [r"clip_grad_norm=0.0", r"None for no clipping"]),
        ({"clip_grad_norm": float("nan")}, [r"clip_grad_norm=nan"]),
        ({"keep_fp32": "norm*"}, [r"keep_fp32='norm\*'", r"\['norm\*'\]"]),
        ({"update_on": "gpu"}, [r"update_on='gpu'", r'"host", "device"']),
        ({"update_on": 1.0}, [r"update_on=1.0", r"between 0 and 1"]),
        ({"update_on": True}, [r"update_on=True"]),
        ({"homes": {"states": "nvme"}}, [r"'states'", r"nvme is not set"]),
        ({"homes": {"weights": "host"}}, [r"'weights'", r"kinds are"]),
        ({"homes": {"grad": "gpu"}}, [r"'gpu'", r"tiers are"]),
    ],
)
def test_settings_are_checked_when_built(settings: dict[str, Any], texts: list[str]) -> None:
    with pytest.raises(ValueError, match=texts[0]) as caught:
        OffloadConfig(**settings)
    for text in texts:
        assert re.search(text, str(caught.value)), f"{text!r} not in {caught.value}"


def test_config_is_frozen_and_keyword_only() -> None:
    config = OffloadConfig()
    with pytest.raises(AttributeError):
        config.micro_batches = 2  # type: ignore[misc]
    with pytest.raises(TypeError):
        OffloadConfig("cpu")  # type: ignore[misc]


@pytest.mark.parametrize(
    ("value", "nbytes"), [("8GiB", 8 << 30), ("900MB", 900 * 10**6), ("1.5 KiB", 1536), (4096, 4096), ("77", 77)]
)
def test_sizes(value: Any, nbytes: int) -> None:
    assert OffloadConfig(host_memory=value).host_budget_nbytes() == nbytes


@pytest.mark.parametrize("device", ["gpu0", "meta", "xla"])
def test_unknown_device(device: str) -> None:
    refused(make(), OffloadConfig(device=device, **FP32), ValueError, re.escape(f"device={device!r}"), r'"auto"')


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has an accelerator")
def test_missing_accelerator() -> None:
    refused(
        make(), OffloadConfig(device="cuda", **FP32), ValueError, r"device='cuda'", r"no accelerator", r'device="auto"'
    )


def test_device_memory_without_a_device() -> None:
    config = OffloadConfig(device="cpu", device_memory="1GiB", **FP32)
    refused(make(), config, ValueError, r"device_memory='1GiB'", r"same memory", r"set host_memory only")


# -- budgets


def test_budget_too_small_without_nvme() -> None:
    message = refused(
        make(), OffloadConfig(device="cpu", host_memory="100KiB", **FP32), BudgetTooSmall, r"host_memory is 100.00 KiB",
        r"smallest host_memory that works is \d+ bytes", r"give nvme=",
    )  # fmt: skip
    # Two units of 8320 and 8256 parameters, each filled up to 10240 = 5 pages of bf16; 4 + 8 + 4 B for each element.
    assert "that works is 327680 bytes" in message


def test_budget_too_small_with_nvme_names_the_unit(tmp_path: Path) -> None:
    config = OffloadConfig(device="cpu", host_memory="16KiB", nvme=tmp_path / "run", **FP32)
    refused(make(), config, BudgetTooSmall, r"host_memory is 16.00 KiB", r"largest unit, '[02]'", r"works is \d+ bytes")
    assert files_below(tmp_path) == {}


def test_device_budget_too_small_names_the_call() -> None:
    config = OffloadConfig(device="fake", device_memory="8KiB", **FP32)
    refused(make(), config, BudgetTooSmall, r"device_memory is 8.00 KiB", r"call of '[02]'", r"works is \d+ bytes")


def blocks() -> nn.Module:
    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.Linear(32, 96), nn.Tanh(), nn.Linear(96, 32)) for _ in range(2)
            )

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    torch.manual_seed(0)
    return Blocks()


@pytest.mark.parametrize("tier", ["host", "host and nvme", "device"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_smallest_budget_that_works_works(tmp_path: Path, tier: str, micro_batches: int) -> None:
    """The mend must be true: with the budget that the refusal names, the engine is built and trains."""

    def build(nbytes: int) -> OffloadEngine:
        settings: dict[str, Any] = {
            "host": {"device": "cpu", "host_memory": nbytes},
            "host and nvme": {"device": "cpu", "host_memory": nbytes, "nvme": tmp_path / f"run{nbytes}"},
            "device": {"device": "fake", "device_memory": nbytes},
        }[tier]
        return OffloadEngine(blocks(), AdamW(), OffloadConfig(**FP32, micro_batches=micro_batches, **settings))

    with pytest.raises(BudgetTooSmall) as refusal:
        build(1)
    match = re.search(r"works is (\d+) bytes", str(refusal.value))
    assert match is not None
    with build(int(match[1])) as engine:
        for _ in range(2):
            for _ in range(micro_batches):
                engine.backward(engine(torch.ones(1, 32)).sum())
            engine.step()
    with pytest.raises(BudgetTooSmall):
        build(int(match[1]) - 4096)


# -- directories


def nvme_config(path: Any, **settings: Any) -> OffloadConfig:
    return OffloadConfig(device="cpu", nvme=path, homes={"states": "nvme"}, **FP32, **settings)


def test_nvme_path_that_is_a_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("precious")
    refused(make(), nvme_config(file), (ValueError, OSError), re.escape(str(file)), r"file", r"directory")
    assert file.read_text() == "precious"
    assert files_below(tmp_path) == {"file": 8}


def test_nvme_path_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    refused(make(), nvme_config(tmp_path / "file" / "run"), (ValueError, OSError), re.escape(str(tmp_path / "file")))
    assert files_below(tmp_path) == {"file": 8}


def test_nvme_path_on_a_read_only_file_system() -> None:
    refused(make(), nvme_config("/proc/offload-test"), (ValueError, OSError), r"/proc/offload-test", r";")


def test_nvme_path_that_is_not_writable(tmp_path: Path) -> None:
    """A directory without write permission. Root may write anywhere, but not where the kernel itself forbids it."""
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0o555)
    target: Path | str = folder
    if os.access(folder, os.W_OK):
        target = "/sys/kernel"
    try:
        refused(
            make(), nvme_config(target), (ValueError, OSError), re.escape(str(target)), r"writ|permission|directory"
        )
    finally:
        folder.chmod(0o755)
    assert files_below(tmp_path) == {"locked": folder.stat().st_size}


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Space is reserved before training starts: what does not fit is found when the engine is built."""

    def full(descriptor: int, offset: int, nbytes: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = files_below(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError) as caught:
            OffloadEngine(make(), AdamW(), nvme_config(tmp_path))
    assert caught.value.errno == errno.ENOSPC
    message = str(caught.value)
    assert str(tmp_path) in message and re.search(r"free|larger drive", message), message
    assert files_below(tmp_path) == before


def test_space_is_reserved_before_training(tmp_path: Path) -> None:
    with OffloadEngine(make(), AdamW(), nvme_config(tmp_path)) as engine:
        reserved = sum(path.stat().st_blocks * 512 for path in tmp_path.rglob("*") if path.is_file())
        assert reserved >= 8 * 16_576
        engine.backward(engine(torch.ones(1, 64)).sum())
        engine.step()
        after = sum(path.stat().st_blocks * 512 for path in tmp_path.rglob("*") if path.is_file())
    assert after <= reserved + 65536  # bookkeeping only


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no tmpfs at /dev/shm to try")
def test_tmpfs_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        caplog.set_level(logging.WARNING, logger="offload")
        with OffloadEngine(make(), AdamW(), nvme_config(folder)) as engine:
            engine.backward(engine(torch.ones(1, 64)).sum())
            engine.step()
        assert any(folder in record.getMessage() and "tmpfs" in record.getMessage() for record in caplog.records)


def test_second_engine_on_one_directory(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with OffloadEngine(make(), AdamW(), nvme_config(folder)) as first:
        before = files_below(tmp_path)
        with pytest.raises(ValueError) as caught:
            OffloadEngine(make(), AdamW(), nvme_config(folder))
        message = str(caught.value)
        assert str(folder) in message and str(os.getpid()) in message and "directory" in message, message
        assert files_below(tmp_path) == before
        first.backward(first(torch.ones(1, 64)).sum())
        first.step()
    with OffloadEngine(make(), AdamW(), nvme_config(folder, overwrite=True)) as later:
        later.backward(later(torch.ones(1, 64)).sum())
        later.step()


def test_lock_holds_between_processes(kit: SimpleNamespace, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    source = f"""
import torch
from torch import nn
from offload import AdamW, OffloadConfig, OffloadEngine
try:
    config = OffloadConfig(device="cpu", nvme={str(folder)!r}, homes={{"states": "nvme"}})
    OffloadEngine(nn.Linear(4, 4), AdamW(), config)
except ValueError as error:
    print("REFUSED", error)
"""
    with OffloadEngine(make(), AdamW(), nvme_config(folder)):
        done = kit.run_script(tmp_path, source)
    assert done.stdout.startswith("REFUSED") and str(folder) in done.stdout, done.stdout + done.stderr


# -- models


def test_trainable_parameter_that_is_not_float() -> None:
    model = make()
    model[0].weight = nn.Parameter(torch.zeros(128, 64, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"'0.weight' has dtype torch.complex64; .*set requires_grad=False"):
        OffloadEngine(model, AdamW(), OffloadConfig(**FP32))


def test_model_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = make()
    with pytest.raises(ValueError, match=r"'0.weight' is on the meta device .*deferred_init"):
        OffloadEngine(model, AdamW(), OffloadConfig(**FP32))


def test_parameters_over_one_memory() -> None:
    model = make()
    model[2].bias = nn.Parameter(model[0].weight.data[0])
    with pytest.raises(ValueError, match=r"'0.weight' and '2.bias' are different objects over the same memory"):
        OffloadEngine(model, AdamW(), OffloadConfig(**FP32))


def test_model_without_trainable_parameters(tmp_path: Path) -> None:
    """Evaluation of a frozen model works; a step has nothing to do and says so."""
    model = make().requires_grad_(False)
    expected = model(torch.ones(1, 64))
    with OffloadEngine(model, AdamW(), OffloadConfig(device="cpu", nvme=tmp_path / "run", **FP32)) as engine:
        assert torch.equal(engine(torch.ones(1, 64)), expected)
        with pytest.raises(RuntimeError, match=r"after 0 of 1 backwards"):
            engine.step()


def test_sparse_gradients_are_refused() -> None:
    model = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Linear(4, 1))
    with OffloadEngine(model, AdamW(), OffloadConfig(**FP32)) as engine:
        loss = engine(torch.arange(3)).sum()
        with pytest.raises(TypeError, match=r"'0.weight' has a torch.sparse_coo gradient; .*sparse=False"):
            engine.backward(loss)


def test_bad_groups_leave_nothing_half_made(tmp_path: Path) -> None:
    """Groups are wrong only when the model is known, so the store must not be there yet, or be gone again."""
    model, threads = make(), len(engine_threads())
    with pytest.raises(ValueError, match=r"'no.such'"):
        OffloadEngine(model, AdamW(groups=[{"params": ["no.such"]}]), nvme_config(tmp_path / "run"))
    assert files_below(tmp_path) == {}
    assert len(engine_threads()) == threads
    assert all(p.isfinite().all() for p in model.parameters())
    OffloadEngine(model, AdamW(), nvme_config(tmp_path / "run")).close()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (lambda: AdamW(lr=-1.0), r"lr=-1.0; AdamW needs a number >= 0"),
        (lambda: AdamW(eps=-1e-8), r"eps=-1e-08"),
        (lambda: SGD(momentum=-0.5), r"momentum=-0.5"),
        (lambda: SGD(nesterov=True), r"nesterov=True needs a momentum > 0"),
        (lambda: AdamW(betas=(0.9, 1.0)), r"betas=\(0.9, 1.0\)"),
    ],
)
def test_optimizer_settings(spec: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OffloadEngine(make(), spec(), OffloadConfig(**FP32))


# -- failures inside the user's code


class Trap(nn.Module):
    """Raises in its next forward or backward when it is armed."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.armed: tuple[str, BaseException] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.armed and self.armed[0] == "forward":
            raise self.armed[1]
        out = torch.tanh(self.linear(x))
        if self.armed and self.armed[0] == "backward" and out.requires_grad:
            error = self.armed[1]

            def spring(grad: Tensor) -> None:
                raise error

            out.register_hook(spring)
        return out


def trapped(
    kit: SimpleNamespace, settings: dict[str, Any], where: str, error: BaseException | None, in_step: int
) -> Any:
    """Three steps of two micro-batches; in step `in_step` the second one fails once, and the step starts over."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), Trap(), nn.Dropout(0.2), nn.Linear(64, 1))
    trap = model[1]
    config = OffloadConfig(**FP32, micro_batches=2, **settings)
    with OffloadEngine(model, AdamW(lr=1e-2), config) as engine:

        def micro_batch(number: int) -> None:
            torch.manual_seed(number)
            engine.backward(engine(torch.randn(4, 64)).square().mean())

        for step in range(3):
            if error is not None and step == in_step:
                micro_batch(2 * step)
                trap.armed = (where, error)
                with pytest.raises(type(error)):
                    micro_batch(2 * step + 1)
                trap.armed = None
                engine.optimizer.zero_grad()
            micro_batch(2 * step)
            micro_batch(2 * step + 1)
            assert not engine.step().skipped
        assert next(model[1].parameters()).isnan().all(), "the unit must have been let go"
        return kit.state_of(engine)


@pytest.mark.parametrize("error", [ZeroDivisionError("user"), KeyboardInterrupt()], ids=["exception", "ctrl-c"])
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("in_step", [0, 2])
def test_failure_in_user_code_leaves_the_engine_whole(
    kit: SimpleNamespace, settings: dict[str, Any], where: str, error: BaseException, in_step: int
) -> None:
    undisturbed = trapped(kit, {"device": "cpu"}, where, None, in_step)
    kit.assert_same_state(trapped(kit, settings, where, error, in_step), undisturbed)


def test_failed_forward_does_not_break_the_accumulation(kit: SimpleNamespace, settings: dict[str, Any]) -> None:
    """A forward that failed has left no gradient, so what was accumulated before it still counts."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), Trap(), nn.Linear(64, 1))
    with OffloadEngine(model, SGD(), OffloadConfig(**FP32, micro_batches=2, **settings)) as engine:
        engine.backward(engine(torch.ones(1, 64)).sum())
        model[1].armed = ("forward", ZeroDivisionError())
        with pytest.raises(ZeroDivisionError):
            engine(torch.ones(1, 64))
        model[1].armed = None
        engine.backward(engine(torch.ones(1, 64)).sum())
        assert not engine.step().skipped


def test_failed_backward_must_be_dropped_first(settings: dict[str, Any]) -> None:
    """A step over half of a gradient would be wrong weights, so it is an error until the gradients are dropped."""
    model = nn.Sequential(nn.Linear(64, 64), Trap(), nn.Linear(64, 1))
    with OffloadEngine(model, SGD(), OffloadConfig(**FP32, **settings)) as engine:
        model[1].armed = ("backward", ZeroDivisionError())
        with pytest.raises(ZeroDivisionError):
            engine.backward(engine(torch.ones(1, 64)).sum())
        model[1].armed = None
        with pytest.raises(RuntimeError, match=r"backward raised midway.*engine.optimizer.zero_grad\(\)"):
            engine.step()
        engine.optimizer.zero_grad()
        engine.backward(engine(torch.ones(1, 64)).sum())
        assert engine.step().step == 1


@pytest.mark.parametrize(
    ("when", "device"),
    [
        ("after a step", "cpu"),
        ("after a backward", "cpu"),
        ("after a backward", "fake"),
        ("after an exception", "fake"),
    ],
)
def test_interpreter_ends_without_close(kit: SimpleNamespace, tmp_path: Path, when: str, device: str) -> None:
    source = f"""
import torch
from torch import nn
from offload import AdamW, OffloadConfig, OffloadEngine
homes = {{"param": "nvme", "states": "nvme", "grad": "nvme"}}
model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 1))
engine = OffloadEngine(model, AdamW(), OffloadConfig(device={device!r}, nvme="run", homes=homes))
engine.backward(engine(torch.ones(1, 64, dtype=torch.bfloat16)).sum())
if {when!r} != "after a backward":
    engine.step()
if {when!r} == "after an exception":
    raise SystemExit(7)
print("end", flush=True)
"""
    done = kit.run_script(tmp_path, source, timeout_s=60)
    assert done.returncode == (7 if when == "after an exception" else 0), done.stderr
    assert done.stderr == ""


def test_real_interrupt_in_a_fetch(kit: SimpleNamespace, tmp_path: Path) -> None:
    """Ctrl-C while the training thread waits for a slow copy: the engine trains on and the interpreter ends."""
    source = """
import _thread, threading, torch
from torch import nn
from offload import SGD, OffloadConfig, OffloadEngine
from offload.scheduler.devices import FakeDevice

class Slow(FakeDevice):
    def upload(self, *args):
        started.set()
        super().upload(*args)

torch.manual_seed(0)
model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
device = Slow(max_delay_s=0.05)
started = threading.Event()
engine = OffloadEngine(model, SGD(), OffloadConfig(device=device, device_memory="40KiB", dtype=torch.float32))

def interrupt():
    started.wait()
    _thread.interrupt_main()

started.clear()
threading.Thread(target=interrupt, daemon=True).start()
try:
    engine(torch.ones(1, 64))
except KeyboardInterrupt:
    print("interrupted")
for _ in range(2):
    engine.backward(engine(torch.ones(1, 64)).sum())
    print(engine.step().skipped)
"""
    done = kit.run_script(tmp_path, source, timeout_s=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["interrupted", "False", "False"]
