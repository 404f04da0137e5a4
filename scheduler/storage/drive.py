"""What the operating system knows about the drive under a directory, and what was measured of it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20
MAX_JOB_NBYTES = 8 * MIB  # what one thread moves without looking back at the queue
MEMORY_FILE_SYSTEMS = frozenset({"tmpfs", "ramfs"})
COPY_ON_WRITE_FILE_SYSTEMS = frozenset({"btrfs", "zfs", "bcachefs", "overlay"})


@dataclass(frozen=True, kw_only=True)
class DriveTuning:
    """How to talk to one drive.

    Attributes:
        chunk_nbytes: larger transfers are cut into requests of this size; a multiple of 1 MiB.
        depth: requests in flight at once in each direction, a thread for each.
        read_gb_s, write_gb_s: measured bandwidth in 1e9 bytes per second, None if not measured.
    """

    chunk_nbytes: int = 4 * MIB
    depth: int = 8
    read_gb_s: float | None = None
    write_gb_s: float | None = None

    def __post_init__(self) -> None:
        if self.chunk_nbytes < MIB or self.chunk_nbytes % MIB or self.depth < 1:
            raise ValueError(
                f"chunk_nbytes {self.chunk_nbytes} must be a positive multiple of {MIB} and depth {self.depth} >= 1"
            )

    def job_nbytes(self, nbytes: int) -> int:
        """Length of the jobs that a transfer of `nbytes` is cut into; a thread moves one job, request by request.

        One job for each of `depth` threads, of whole requests and within `MAX_JOB_NBYTES`: fewer and longer than
        requests, because each job costs the loop and the threads a fifth of a millisecond.
        """
        num_requests = -(-nbytes // (self.depth * self.chunk_nbytes))
        return self.chunk_nbytes * max(1, min(num_requests, MAX_JOB_NBYTES // self.chunk_nbytes))


def file_system(path: Path) -> str:
    """Type of the file system that holds `path` ("ext4", "tmpfs", ...), "unknown" where the system does not say."""
    device = os.stat(path).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    by_mount: list[tuple[int, str]] = []
    resolved = str(Path(path).resolve())
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    for line in lines:
        left, _, right = line.partition(" - ")
        fields, kind = left.split(), right.split()[0]
        mount = fields[4].encode().decode("unicode_escape")
        if fields[2] == wanted:
            return kind
        if resolved == mount or resolved.startswith(mount.rstrip("/") + "/"):
            by_mount.append((len(mount), kind))
    return max(by_mount)[1] if by_mount else "unknown"
