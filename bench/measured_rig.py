"""This machine as a rig: each lane's speed measured alone, in seconds rather than minutes."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy
import torch

from offload.config import available_host_nbytes, usable_cores
from offload.kernels.master import split_
from offload.kernels.optimizer import AdamScalars, adam_
from offload.scheduler.rig import GB, ComputeSpeed, CoreSpeed, DriveSpeed, LinkSpeed, Rig, TierSizes
from offload.scheduler.storage.probe import ProbeReport

from .machine import native_bfloat16
from .models.gpt import GPT, preset

CHUNK_NUMEL, CHUNKS_PER_CORE = 1 << 19, 8  # more than any cache holds
LINK_NBYTES = 256 << 20
BATCH, SEQ = 2, 256
_ADAMW = AdamScalars(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, step=1, decoupled=True)


def measure_rig(drives: Sequence[ProbeReport], dtype: torch.dtype | None = None) -> Rig:
    """Measure cores, compute and link of this machine, and put them beside what the probe said of its drives.

    Several drives count as one with the sum of their speeds. Compute is a training step of the GPT preset "small" in
    plain torch, in `dtype` (None: bfloat16 where the hardware multiplies it, else float32).
    """
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if dtype is None:
        dtype = torch.bfloat16 if native_bfloat16(str(device or "cpu")) else torch.float32
    cores = usable_cores()
    with ThreadPoolExecutor(cores) as executor:

        def side_by_side(work: Callable[[int], object]) -> float:
            """Median seconds in which every core calls `work(core)` once."""
            return _median_s(lambda: list(executor.map(work, range(cores))))

        chunks = [[_Chunk() for _ in range(CHUNKS_PER_CORE)] for _ in range(cores)]
        update_s = side_by_side(lambda core: _each(chunks[core], _Chunk.update))
        stream_s = side_by_side(lambda core: _each(chunks[core], _Chunk.stream))
    numel = CHUNK_NUMEL * CHUNKS_PER_CORE
    return Rig(
        name=f"measured: {cores} cores, {device or 'no accelerator'}",
        drive=_drive(drives),
        link=None if device is None else _link(device),
        cores=CoreSpeed(
            count=cores,
            update_elements_s=numel / update_s,
            dram_gb_s=numel * cores * _Chunk.STREAM_NBYTES / stream_s / GB,
        ),
        compute=ComputeSpeed(flop_s=_flop_s(device, dtype)),
        sizes=TierSizes(
            host=available_host_nbytes(),
            device=0 if device is None else torch.accelerator.get_memory_info(device)[0],
            nvme=sum(drive.free_nbytes for drive in drives),
        ),
    )


class _Chunk:
    """The arrays of one chunk as an update finds them: bf16 parameters with a split master, fp32 moments."""

    STREAM_NBYTES = 12  # a += b in fp32: two read, one written

    def __init__(self) -> None:
        draws = torch.Generator().manual_seed(0)
        self._moments = torch.rand(2, CHUNK_NUMEL, generator=draws)
        self._grad = torch.randn(CHUNK_NUMEL, generator=draws).to(torch.bfloat16)
        self._param = torch.empty(CHUNK_NUMEL, dtype=torch.bfloat16)
        self._low = torch.empty(CHUNK_NUMEL, dtype=torch.int16)
        split_(torch.randn(CHUNK_NUMEL, generator=draws), self._param, self._low)

    def update(self) -> None:
        adam_(self._param, self._low, self._moments[0], self._moments[1], self._grad, _ADAMW, 1.0)

    def stream(self) -> None:
        numpy.add(self._moments[0].numpy(), self._moments[1].numpy(), out=self._moments[0].numpy())


def _each(chunks: Sequence[_Chunk], work: Callable[[_Chunk], None]) -> None:
    for chunk in chunks:
        work(chunk)


def _drive(drives: Sequence[ProbeReport]) -> DriveSpeed | None:
    """One drive with the speeds of all: what both directions take together was measured, so that is its law."""
    if not drives:
        return None
    return DriveSpeed(
        read_gb_s=sum(drive.read_gb_s for drive in drives),
        write_gb_s=sum(drive.write_gb_s for drive in drives),
        mixed_gb_s=sum(drive.mixed_gb_s for drive in drives),
        law="mixed",
        latency_s=max(drive.read_latency_s for drive in drives),
        depth=max(drive.depth for drive in drives),
    )


def _link(device: torch.device) -> LinkSpeed:
    host = torch.empty(LINK_NBYTES, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(LINK_NBYTES, dtype=torch.uint8, device=device)

    def gb_s(target: torch.Tensor, source: torch.Tensor) -> float:
        def copy() -> None:
            target.copy_(source, non_blocking=True)
            torch.accelerator.synchronize()

        return LINK_NBYTES / _median_s(copy) / GB

    return LinkSpeed(h2d_gb_s=gb_s(there, host), d2h_gb_s=gb_s(host, there))


def _flop_s(device: torch.device | None, dtype: torch.dtype) -> float:
    """Operations per second of a training step, without an optimizer."""
    config = preset("small", context=SEQ)
    model = GPT(config).to(device or "cpu", dtype)
    ids = torch.randint(256, (BATCH, SEQ), generator=torch.Generator().manual_seed(0)).to(device or "cpu")

    def step() -> None:
        model(ids, ids).backward()
        model.zero_grad()
        if device is not None:
            torch.accelerator.synchronize()

    return BATCH * SEQ * config.flops_per_token(SEQ) / _median_s(step)


def _median_s(work: Callable[[], object], repeats: int = 3) -> float:
    """Median seconds of `repeats` calls, after one that does not count."""
    seconds = []
    for _ in range(repeats + 1):
        began_s = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began_s)
    return float(numpy.median(seconds[1:]))
