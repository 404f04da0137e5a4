"""What a user decides about a run; everything is checked when the object is built."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from . import layout
from .loss_scale import DynamicLossScale
from .scheduler.devices import AcceleratorDevice, Device, FakeDevice, OneMemoryDevice
from .scheduler.lanes import Lanes
from .scheduler.rig import Rig
from .scheduler.storage import Backend
from .scheduler.trace import Trace
from .sizes import parse_size
from .threads import Threads, check_threads, plan_threads
from .weights.progress import FillProgress

HOME_KINDS = ("param", "states", "grad")
HOME_TIERS = ("host", "nvme")
UPDATE_MODES = ("auto", "next_forward", "backward", "speculative", "step")


@dataclass(frozen=True, kw_only=True)
class OffloadConfig:
    """Settings of one engine.

    Args:
        device: "auto" (the accelerator if there is one, else the CPU), a torch device string, "fake" (a slow,
            poisoned device in host memory for tests and rigs), or a `scheduler.devices.Device`.
        nvme: one directory, a list of directories (one per drive), or None for no NVMe tier.
        device_memory: budget of staged units on the device ("8GiB", bytes, or "auto": 80 % of what is free).
            Only where the device has a memory of its own.
        host_memory: budget of everything that the engine keeps in DRAM: staged units, gradients, states, rings
            ("8GiB", bytes, or "auto": half of what the system says is available).
        activation_memory: bytes of what autograd saves that may be kept for backward, beside the other budgets; where
            they do not suffice, units compute again in backward. 0: always. "auto": where device and host are one
            memory, as much as host_memory, but at most a quarter of what the system says is available; on a device,
            a quarter of what device_memory leaves free.
        dtype: compute dtype of the parameters, torch.bfloat16, torch.float16 or torch.float32. Buffers keep theirs.
        loss_scale: what `engine.backward` and `train_step` multiply the loss with and the update divides out again, so
            that float16 gradients do not vanish: "dynamic" or a `DynamicLossScale` (skip, grow and back off as
            `torch.amp.GradScaler` does), a number, or None for none. Norms, clipping and reports are without it.
        ema_decay: keep an exponential moving average of the weights with this decay (0 to 1), one more fp32 array per
            trainable parameter, updated with every step that is not skipped; None for none.
        keep_fp32: patterns (`fnmatch` on parameter names) of parameters that stay fp32.
        trainable: patterns (`fnmatch` on parameter names) of parameters that start frozen and may be unfrozen later:
            states are reserved for them. Others that are frozen when the engine is built stay so.
        units: what travels together, where the automatic choice (blocks, embeddings, heads; finer where a budget asks
            for it) is not wanted: module classes, and patterns (`fnmatch`) on module names. Each module that fits is
            one unit and is never cut; the rest is chosen as before. `print(engine)` shows the units.
        micro_batches: backwards per step.
        clip_grad_norm: maximum global gradient norm, or None.
        homes: forces the home tier of a kind, e.g. {"states": "nvme"}; kinds are "param", "states" (master's low
            half and moments) and "grad". What is not named is placed by the plan.
        update: when a unit is updated; all modes give the same bits.
            "next_forward": before its next use, while earlier units compute already.
            "backward": as soon as its gradient is complete, in backward; what is left goes on in the next forward. Only
            without clipping, and a step that is not finite is not skipped.
            "speculative": as "backward", also with clipping: where the norm or a value that is not finite turns out to
            matter, what was begun is taken back and made anew. Needs nvme and durability="step".
            "step": `step()` waits until all units are updated.
            "auto": "speculative" where that is possible and at most 1 of the last 20 steps (at least 4) was clipped or
            skipped, else "next_forward".
        update_on: where updates are computed, on a device with a memory of its own; the bits are the same.
            "host": where the states rest or stream through, on the CPU's cores.
            "device": states cross the link and back, in chunks that take a few MiB of device_memory.
            f with 0 < f < 1: this share of the chunks on the device, the others on the host.
        durability: what survives a crash, where there is an NVMe tier: "step" (every finished step), N (every N-th),
            or "none" (half the space on the drives, and nothing survives). What rests in host memory is part of it.
        verify: whether every read from the store is compared with its checksum.
        resume: go on from the last committed step of the store in `nvme`, bit for bit.
        overwrite: discard a store in `nvme` that could be resumed.
        threads: how many threads work beside those of torch, where the plan's numbers shall not hold: "update" (updates
            and sums on the cores) and "io" (for each of reading and writing). All numbers give the same bits.
        rig: what the machine's lanes can do (a `scheduler.rig.Rig`, or the path of its TOML file), so that each step is
            reported beside its lower bound (`StepInfo.bound_s`); None reports none.
        progress: what shows how the tiers are filled: "auto" (a line on a terminal, nothing elsewhere), None, or a
            function that is called with a `FillProgress` now and then.
        rated_endurance: bytes that the drives may be written in their life ("600TB"), for the wear account.

    Raises: ValueError with the value, what was expected and the mend.
    """

    device: str | torch.device | Device = "auto"
    nvme: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None
    device_memory: str | int = "auto"
    host_memory: str | int = "auto"
    activation_memory: str | int = "auto"
    dtype: torch.dtype = torch.bfloat16
    loss_scale: Literal["dynamic"] | float | DynamicLossScale | None = None
    ema_decay: float | None = None
    keep_fp32: Sequence[str] = ()
    trainable: Sequence[str] = ()
    units: Sequence[str | type[nn.Module]] = ()
    micro_batches: int = 1
    clip_grad_norm: float | None = None
    homes: Mapping[str, str] = field(default_factory=dict)
    update: Literal["auto", "next_forward", "backward", "speculative", "step"] = "auto"
    update_on: Literal["host", "device"] | float = "host"
    durability: Literal["step", "none"] | int = "step"
    verify: bool = True
    resume: bool = False
    overwrite: bool = False
    threads: Mapping[str, int] = field(default_factory=dict)
    rig: Rig | str | os.PathLike[str] | None = None
    progress: Literal["auto"] | Callable[[FillProgress], object] | None = "auto"
    rated_endurance: str | int | None = None

    def __post_init__(self) -> None:
        _check_dtype(self.dtype)
        if not isinstance(self.micro_batches, int) or isinstance(self.micro_batches, bool) or self.micro_batches < 1:
            raise ValueError(
                f"micro_batches={self.micro_batches!r}; it is the number of backwards per step, an int >= 1"
            )
        if self.clip_grad_norm is not None and not self.clip_grad_norm > 0:
            raise ValueError(f"clip_grad_norm={self.clip_grad_norm!r}; give a positive number, or None for no clipping")
        if self.update not in UPDATE_MODES:
            raise ValueError(f"update={self.update!r}; give one of {', '.join(map(repr, UPDATE_MODES))}")
        is_share = isinstance(self.update_on, float) and 0 < self.update_on < 1
        if self.update_on not in ("host", "device") and not is_share:
            raise ValueError(
                f'update_on={self.update_on!r}; give "host", "device", or the share of the chunks that the device '
                "updates, a float between 0 and 1"
            )
        if self.update == "backward" and self.clip_grad_norm is not None:
            raise ValueError(
                f'update="backward" begins before the norm is known, so clip_grad_norm={self.clip_grad_norm} cannot be '
                'kept; give update="speculative" or "next_forward"'
            )
        self._check_numbers()
        if self.update == "speculative" and self.commit_interval != 1:
            raise ValueError(
                'update="speculative" takes back what it guessed wrong from the committed step, so it needs nvme=... '
                'and durability="step"; give both, or update="next_forward"'
            )
        for name in ("keep_fp32", "trainable"):
            if isinstance(value := getattr(self, name), str):
                raise ValueError(f"{name}={value!r} is one string; give a list of patterns, e.g. [{value!r}]")
        for name in ("host_memory", "device_memory"):
            if getattr(self, name) != "auto":
                parse_size(getattr(self, name), name)
        if self.activation_memory not in ("auto", 0):
            parse_size(self.activation_memory, "activation_memory")
        check_threads(self.threads)
        if self.progress not in ("auto", None) and not callable(self.progress):
            raise ValueError(f'progress={self.progress!r}; give "auto", None, or a function that takes a FillProgress')
        self._check_units()
        self._check_homes()
        self._check_store()

    def _check_numbers(self) -> None:
        scale = self.loss_scale
        is_number = isinstance(scale, (int, float)) and not isinstance(scale, bool) and 0 < scale < math.inf
        if not (scale is None or scale == "dynamic" or isinstance(scale, DynamicLossScale) or is_number):
            raise ValueError(
                f'loss_scale={scale!r}; give "dynamic", a DynamicLossScale, a positive number, or None for no scale'
            )
        if self.update == "backward" and (scale == "dynamic" or isinstance(scale, DynamicLossScale)):
            raise ValueError(
                'update="backward" cannot skip a step, which a dynamic loss scale has to where gradients overflow; '
                'give update="speculative" or "next_forward", or a fixed loss_scale'
            )
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay!r}; give a number between 0 and 1, or None for no average")

    def _check_units(self) -> None:
        fits = isinstance(self.units, Sequence) and not isinstance(self.units, str)
        if not fits or not all(
            isinstance(e, str) or (isinstance(e, type) and issubclass(e, nn.Module)) for e in self.units
        ):
            raise ValueError(
                f"units={self.units!r}; give a list of module classes and patterns of module names, e.g. "
                '[TransformerBlock, "encoder.layers.*"]'
            )

    def _check_homes(self) -> None:
        for kind, tier in self.homes.items():
            if kind not in HOME_KINDS or tier not in HOME_TIERS:
                raise ValueError(f"homes has {kind!r}: {tier!r}; kinds are {HOME_KINDS}, tiers are {HOME_TIERS}")
            if tier == "nvme" and not self.nvme_directories:
                raise ValueError(
                    f'homes puts {kind!r} on "nvme" but nvme is not set; give nvme="/a/directory/on/a/drive"'
                )

    def _check_store(self) -> None:
        is_interval = (
            isinstance(self.durability, int) and not isinstance(self.durability, bool) and self.durability >= 1
        )
        if self.durability not in ("step", "none") and not is_interval:
            raise ValueError(f'durability={self.durability!r}; give "step", "none", or a number of steps >= 1')
        if self.resume and not self.nvme_directories:
            raise ValueError("resume=True, but nvme is not set; give the directory of the run to go on with")
        if self.resume and self.durability == "none":
            raise ValueError('resume=True with durability="none"; what was written with "none" cannot be resumed')
        if self.resume and self.overwrite:
            raise ValueError("resume=True and overwrite=True contradict each other; give one of them")
        if self.rated_endurance is not None:
            parse_size(self.rated_endurance, "rated_endurance")

    def read_rig(self) -> Rig | None:
        """The rig, read from its file where a path is given. Raises: ValueError for a file that is none."""
        if self.rig is None or isinstance(self.rig, Rig):
            return self.rig
        return Rig.read(Path(self.rig))

    @property
    def commit_interval(self) -> int | None:
        """Steps between commits, or None where nothing is committed."""
        if self.durability == "none" or not self.nvme_directories:
            return None
        return 1 if self.durability == "step" else int(self.durability)

    @property
    def rated_endurance_nbytes(self) -> int | None:
        return None if self.rated_endurance is None else parse_size(self.rated_endurance, "rated_endurance")

    @property
    def nvme_directories(self) -> tuple[Path, ...]:
        """The NVMe directories as paths; empty without an NVMe tier."""
        if self.nvme is None:
            return ()
        if isinstance(self.nvme, (str, os.PathLike)):
            return (Path(self.nvme),)
        return tuple(Path(directory) for directory in self.nvme)

    def open_device(self) -> Device:
        """The device that `device` names.

        Raises: ValueError if it names none that torch has here, or if device_memory or update_on are given to a device
            without a memory of its own.
        """
        device = self._find_device()
        if device.one_memory and self.device_memory != "auto":
            raise ValueError(
                f"device_memory={self.device_memory!r}, but without an accelerator device and host are the same "
                f"memory; "
                "set host_memory only"
            )
        if device.one_memory and self.update_on != "host":
            raise ValueError(
                f"update_on={self.update_on!r}, but without an accelerator there is only the host to update on; leave "
                'update_on="host", or give device=... an accelerator'
            )
        return device

    @property
    def device_share(self) -> float:
        """The share of chunks that are updated on the device."""
        if isinstance(self.update_on, float):
            return self.update_on
        return 1.0 if self.update_on == "device" else 0.0

    def chunk_numel(self) -> int:
        """Elements of one chunk, as which states stream."""
        return layout.CHUNK_NUMEL

    def plan_threads(self) -> Threads:
        """How many threads compute, update and move bytes."""
        return plan_threads(self.threads, cores=usable_cores(), drives=len(self.nvme_directories))

    def open_lanes(self) -> Lanes:
        """The lanes that the engine runs on, with an empty trace."""
        threads = self.plan_threads()
        return Lanes(Trace(), num_io_threads=threads.io, num_cpu_threads=threads.update)

    def backend_factory(self) -> Callable[[Path], Backend] | None:
        """What makes the storage of each NVMe directory; None: files, by direct I/O where the system has it."""
        return None

    def _find_device(self) -> Device:
        if isinstance(self.device, Device):
            return self.device
        if self.device == "fake":
            return FakeDevice()
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        if self.device == "auto":
            return AcceleratorDevice(accelerator) if accelerator is not None else OneMemoryDevice()
        try:
            wanted = torch.device(self.device)
        except RuntimeError as error:
            raise ValueError(
                f'device={self.device!r} is not a device; give "auto", "cpu", "cuda", ... ({error})'
            ) from None
        if wanted.type == "cpu":
            return OneMemoryDevice()
        if accelerator is None or accelerator.type != wanted.type:
            raise ValueError(
                f"device={self.device!r}, but torch finds {accelerator or 'no accelerator'} here; "
                'give device="auto", or install the torch build of your accelerator'
            )
        return AcceleratorDevice(wanted)

    def host_budget_nbytes(self) -> int:
        if self.host_memory == "auto":
            return available_host_nbytes() // 2
        return parse_size(self.host_memory, "host_memory")

    def activation_budget_nbytes(self, device: Device) -> int:
        """Bytes of activations that may be kept for backward."""
        if self.activation_memory == 0:
            return 0
        if self.activation_memory != "auto":
            return parse_size(self.activation_memory, "activation_memory")
        if device.one_memory:
            return min(self.host_budget_nbytes(), available_host_nbytes() // 4)
        return max(0, (device.free_nbytes() or 0) - self.device_budget_nbytes(device)) // 4

    def device_budget_nbytes(self, device: Device) -> int:
        """Bytes for staged units on `device`; 0 where it shares the host's memory."""
        if device.one_memory:
            return 0
        if self.device_memory == "auto":
            return (device.free_nbytes() or 0) * 8 // 10
        return parse_size(self.device_memory, "device_memory")


def _check_dtype(dtype: Any) -> None:
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"dtype={dtype!r}; the compute dtype is torch.bfloat16, torch.float16 or torch.float32")


def usable_cores() -> int:
    """Cores that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def available_host_nbytes() -> int:
    """Memory that new allocations can have without swapping: the system's word, or a tighter cgroup limit."""
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text().strip()
        if limit != "max":
            available = min(available, int(limit) - int(used))
    except (OSError, ValueError):
        pass  # not Linux, or no cgroup v2: the first figure stands
    return max(available, 1)
