"""What this machine and installation offer, and what is missing for full speed."""

from __future__ import annotations

import importlib
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from offload.config import available_host_nbytes, usable_cores
from offload.kernels import dispatch
from offload.kernels.native import library
from offload.scheduler.storage import PosixBackend, file_system, prove

from . import machine
from .memory import format_nbytes

CPU_FLAGS = ("avx2", "f16c", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "amx_bf16")
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report. `advice` says what to do about it, empty where nothing is to be done."""

    name: str
    value: str
    advice: str = ""
    usable: bool = True  # False: the engine cannot run like this


def examine(directories: list[Path]) -> list[Finding]:
    """Everything worth knowing before a run; each directory is tried with direct I/O and left as it was.

    Raises: ValueError for a path that is not a directory.
    """
    about = machine.describe()
    return [
        Finding(name="python", value=f"{about.python}, {platform.system()} {platform.machine()}"),
        Finding(name="torch", value=about.torch),
        Finding(name="triton", value=_triton_version()),
        *_kernels(),
        Finding(name="cpu", value=f"{about.cpu}, {usable_cores()} cores usable, torch uses {torch.get_num_threads()}"),
        Finding(name="cpu flags", value=" ".join(flag for flag in CPU_FLAGS if flag in _cpu_flags()) or "none known"),
        Finding(
            name="host memory",
            value=f"{format_nbytes(about.ram_nbytes)}, {format_nbytes(available_host_nbytes())} available, "
            f"cgroup limit {_cgroup_limit()}",
        ),
        *_devices(),
        *(_directory(directory) for directory in directories),
    ]


def _triton_version() -> str:
    try:
        return str(importlib.import_module("triton").__version__)
    except ImportError:
        return "not installed"


def _kernels() -> list[Finding]:
    """Which implementation runs for tensors in host memory, and for those of an accelerator where there is one."""
    try:
        name = dispatch.implementation()
    except RuntimeError as problem:
        return [Finding(name="kernels, cpu", value="cannot run", advice=str(problem), usable=False)]
    if name == "native":
        with library.limit_isa("avx512") as isa:
            found = [Finding(name="kernels, cpu", value=f"native, {isa}")]
    else:
        speed = "up to 3 times the CPU time of native" if name == "numba" else "slower"
        found = [Finding(name="kernels, cpu", value=f"{name}, {speed}", advice=dispatch.why_not_native() or "")]
    if torch.cuda.is_available():
        triton = dispatch.uses_triton(torch.device("cuda"))
        advice = "" if triton else "Install triton, and leave OFFLOAD_KERNELS unset."
        found.append(
            Finding(name="kernels, gpu", value="triton" if triton else "reference, several times slower", advice=advice)
        )
    return found


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split(":", 1)[1].split()) for line in lines if line.startswith(("flags", "Features"))), set())


def _cgroup_limit() -> str:
    try:
        limit = CGROUP_LIMIT.read_text().strip()
    except OSError:
        return "unknown"
    return format_nbytes(int(limit)) if limit.isdecimal() else "none"


def _devices() -> list[Finding]:
    if not torch.accelerator.is_available():
        return [Finding(name="device", value="none: compute runs on the cores")]
    found = []
    for index in range(torch.accelerator.device_count()):
        name, memory = str(torch.accelerator.current_accelerator()), ""
        if torch.cuda.is_available():
            facts = torch.cuda.get_device_properties(index)
            name, memory = facts.name, f", {format_nbytes(facts.total_memory)}, sm_{facts.major}{facts.minor}"
        found.append(Finding(name=f"device {index}", value=name + memory))
    return found


def _directory(path: Path) -> Finding:
    if not path.is_dir():
        raise ValueError(f"{str(path)!r} is not a directory; name an existing one on the drive that you mean.")
    if not os.access(path, os.W_OK):
        raise ValueError(f"{str(path)!r} is not writable; name a directory that is.")
    free = format_nbytes(PosixBackend(path, direct=False).free_nbytes())
    where = f"{file_system(path)}, {free} free"
    try:
        prove(PosixBackend(path, direct=True))
    except (OSError, ValueError, AttributeError) as problem:  # AttributeError: a system without O_DIRECT
        advice = f"{problem}. Name a directory on a local ext4 or xfs file system for full speed."
        return Finding(name=f"directory {path}", value=f"{where}, direct I/O does not work", advice=advice)
    return Finding(name=f"directory {path}", value=f"{where}, direct I/O works")
