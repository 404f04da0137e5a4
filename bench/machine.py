"""What a figure was measured on: the lines that stand above every table."""

import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from .memory import format_nbytes


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One computer and one build, described well enough to compare figures. `ram_nbytes` is bytes; the rest is text."""

    time: str
    commit: str
    python: str
    torch: str
    cpu: str
    num_cores: int
    ram_nbytes: int
    accelerator: str
    file_system: str

    def lines(self) -> list[str]:
        """Two lines for the head of a table."""
        return [
            f"{self.time}  commit {self.commit}  torch {self.torch}  python {self.python}",
            f"{self.cpu}, {self.num_cores} cores, {format_nbytes(self.ram_nbytes)} RAM, "
            f"accelerator {self.accelerator}, NVMe directory on {self.file_system}",
        ]

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def describe(directory: Path | None = None) -> Machine:
    """This machine now; `directory` is where the NVMe tier lies, if there is one."""
    return Machine(
        time=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        commit=_commit(),
        python=platform.python_version(),
        torch=torch.__version__,
        cpu=_cpu(),
        num_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        ram_nbytes=_ram_nbytes(),
        accelerator=_accelerator(),
        file_system=_file_system(directory) if directory is not None else "none",
    )


def _commit() -> str:
    """Short hash of the source tree that this file belongs to, with `+` when it is edited; `unknown` outside git."""
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _ram_nbytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def _accelerator() -> str:
    if not torch.accelerator.is_available():
        return "none"
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return str(torch.accelerator.current_accelerator())


def _file_system(directory: Path) -> str:
    """Type and device of the mount that holds `directory`, as in `ext4 (/dev/nvme0n1)`."""
    best, answer = "", "unknown"
    try:
        mounts = Path("/proc/mounts").read_text().splitlines()
    except OSError:
        return answer
    resolved = str(directory.resolve())
    for line in mounts:
        device, mount, kind = line.split()[:3]
        inside = resolved == mount or resolved.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= len(best):
            best, answer = mount, f"{kind} ({device})"
    return answer


def native_bfloat16(device: str) -> bool:
    """Whether `device` multiplies bfloat16 matrices in hardware; without it bfloat16 costs several times float32."""
    if not device.startswith("cpu"):
        return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    return any(
        getattr(torch.cpu, name, lambda: False)()
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_arm_bf16_supported")
    )
