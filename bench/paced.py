"""Engines on a rig: lanes of the rig's speed on whatever machine this is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from offload import OffloadConfig
from offload.scheduler.devices import Device, FakeDevice, OneMemoryDevice
from offload.scheduler.lanes import Lanes
from offload.scheduler.paced_lane import PacedLane
from offload.scheduler.rig import Rig
from offload.scheduler.storage import Backend, MemoryBackend, Pace, PacedBackend
from offload.scheduler.trace import Trace
from offload.store.folder import InMemory

MAX_IO_THREADS = 8
CHUNK_STEP = 2048  # chunks are whole pages
STATE_NBYTES = 8  # Adam's two moments


@dataclass(frozen=True, kw_only=True)
class PacedConfig(OffloadConfig):
    """The configuration of an engine whose lanes are paced to `rig`; for benches and tests, never for real runs.

    The drive keeps its files in memory, `nvme` only names it. Bytes and arithmetic are real, and what the machine is
    slower at than the rig shows. Only updates are paced on the `cpu` lane, as Adam's.

    Args:
        rig: the speeds; budgets are those of the other arguments.
        small_chunk: elements of a chunk, so that small units are cut into as many chunks as large ones would be.
    """

    rig: Rig
    small_chunk: int | None = None

    def chunk_numel(self) -> int:
        if self.small_chunk is None:
            return super().chunk_numel()
        return max(CHUNK_STEP, self.small_chunk // CHUNK_STEP * CHUNK_STEP)

    def open_device(self) -> Device:
        link = self.rig.link
        if link is None:
            return OneMemoryDevice()
        return FakeDevice(
            max_delay_s=0.0, capacity_nbytes=self.rig.sizes.device, h2d_gb_s=link.h2d_gb_s, d2h_gb_s=link.d2h_gb_s
        )

    def open_lanes(self) -> Lanes:
        num_io_threads = min(MAX_IO_THREADS, self.rig.drive.depth) if self.rig.drive is not None else 1
        lanes = Lanes(Trace(), num_io_threads=num_io_threads, num_cpu_threads=1)
        lanes.cpu.close()
        lanes.cpu = PacedLane("cpu", self.rig.cores.count, lanes.trace, self._cpu_s)
        return lanes

    def backend_factory(self) -> Callable[[Path], Backend] | None:
        drive = self.rig.drive
        if drive is None:
            raise ValueError(f"nvme is set, but rig {self.rig.name!r} has no drive")
        pace = Pace(
            read_gb_s=drive.read_gb_s,
            write_gb_s=drive.write_gb_s,
            law=drive.law,
            mixed_gb_s=drive.mixed_gb_s,
            latency_s=drive.latency_s,
            depth=drive.depth,
        )
        return InMemory(lambda root: PacedBackend(MemoryBackend(root), pace))

    def _cpu_s(self, kind: str, nbytes: int) -> float:
        """Seconds of one call on one core: `nbytes` of an update are parameter, low half, moments and gradient."""
        if kind != "update":
            return 0.0
        width = self.dtype.itemsize
        low = 2 if self.dtype == torch.bfloat16 else 0
        gradient = 4 if self.micro_batches > 1 else width
        return nbytes / (width + low + STATE_NBYTES + gradient) / self.rig.cores.update_elements_s
