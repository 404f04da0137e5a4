"""Resident memory of this process, as the kernel counts it."""

import resource
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")


def rss_nbytes() -> int:
    """Resident bytes now, or the peak where the system does not say (not Linux)."""
    return _status_nbytes("VmRSS")


def peak_rss_nbytes() -> int:
    """Largest resident set so far, in bytes; on Linux since exec, while getrusage also counts what exec replaced."""
    return _status_nbytes("VmHWM")


def _status_nbytes(field: str) -> int:
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def format_nbytes(nbytes: float) -> str:
    """Bytes for people: `1.50 GiB`, `12.0 MiB`, `9 B`; GiB = 2**30 B."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(nbytes) >= size:
            return f"{nbytes / size:.3g} {unit}" if abs(nbytes) < 1000 * size else f"{nbytes / size:.0f} {unit}"
    return f"{nbytes:.0f} B"
