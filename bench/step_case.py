"""One case of the step table, alone in a process so that its peak memory is its own.

`python -P -m offload.bench.step_case JSON` runs the case that JSON describes and prints the measurement as JSON.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from offload import AdamW, OffloadConfig, OffloadEngine, StepInfo
from offload.bound import StepWork, step_work
from offload.store.checksum import spent_s

from . import text
from .memory import peak_rss_nbytes, rss_nbytes
from .models.gpt import GPT, preset
from .plain import PlainTrainer

CASES = {
    "plain": "plain torch in memory",
    "plain-recompute": "plain torch in memory, blocks recomputed",
    "memory": "engine, everything in memory",
    "states-nvme": "engine, states on NVMe",
    "nvme": "engine, everything on NVMe",
}
HOMES = {
    "memory": {"param": "host", "states": "host", "grad": "host"},
    "states-nvme": {"param": "host", "states": "nvme", "grad": "host"},
    "nvme": {"param": "nvme", "states": "nvme", "grad": "nvme"},
}
LR, WEIGHT_DECAY = 1e-4, 0.1


@dataclass(frozen=True, kw_only=True)
class StepCase:
    """What one process runs: `warm_up` steps that are not counted, then `steps` that are."""

    case: str
    model: str
    batch: int
    seq: int
    warm_up: int
    steps: int
    dtype: str
    device: str
    nvme: str | None
    host_memory: str | int
    durability: str
    verify: bool
    update: str = "auto"
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one process saw. Lists have one entry per counted step; `read_nbytes` and `write_nbytes` are NVMe bytes,
    `hash_s` the CPU seconds that their checksums took, `compute_s` the seconds of forward and of backward (plain torch
    only), `work` what the placement makes a step move (`bound.StepWork`, the engine only)."""

    case: str
    num_parameters: int
    step_s: list[float]
    losses: list[float]
    read_nbytes: list[int]
    write_nbytes: list[int]
    exposed_s: list[float]
    hash_s: list[float]
    compute_s: list[tuple[float, float]]
    work: dict[str, dict[str, float]] | None
    baseline_rss_nbytes: int
    peak_rss_nbytes: int
    device_peak_nbytes: int


def run(case: StepCase) -> StepResult:
    """Run one case in this process."""
    baseline_nbytes = rss_nbytes()
    torch.manual_seed(case.seed)
    model = GPT(preset(case.model, context=case.seq))
    hashing_s: list[float] = []
    compute_s: list[tuple[float, float]] = []
    infos: list[StepInfo] = []
    work = None
    if case.case.startswith("plain"):
        losses, seconds = _run_plain(case, model, compute_s)
    else:
        losses, seconds, work = _run_engine(case, model, infos, hashing_s)
    counted = slice(case.warm_up, None)
    return StepResult(
        case=case.case,
        num_parameters=model.config.num_parameters,
        step_s=seconds[counted],
        losses=losses[counted],
        read_nbytes=[info.nbytes.get("read", 0) for info in infos[counted]],
        write_nbytes=[info.nbytes.get("write", 0) for info in infos[counted]],
        exposed_s=[sum(info.exposed_s.values()) for info in infos[counted]],
        hash_s=hashing_s[counted],
        compute_s=compute_s[counted],
        work=None if work is None else asdict(work),
        baseline_rss_nbytes=baseline_nbytes,
        peak_rss_nbytes=peak_rss_nbytes(),
        device_peak_nbytes=torch.accelerator.max_memory_allocated() if torch.accelerator.is_available() else 0,
    )


def _run_plain(case: StepCase, model: GPT, compute_s: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    device = case.device
    if device == "auto":
        device = str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu"
    trainer = PlainTrainer(
        model,
        lr=LR,
        weight_decay=WEIGHT_DECAY,
        dtype=getattr(torch, case.dtype),
        device=device,
        recompute=case.case == "plain-recompute",
    )

    def step(ids: Tensor, targets: Tensor) -> float:
        loss = trainer.step(ids, targets)
        compute_s.append(trainer.compute_s)
        return loss

    return _timed(case, device, step)


def _run_engine(
    case: StepCase, model: GPT, infos: list[StepInfo], hashing_s: list[float]
) -> tuple[list[float], list[float], StepWork]:
    config = OffloadConfig(
        device=case.device,
        nvme=case.nvme,
        host_memory=case.host_memory,
        dtype=getattr(torch, case.dtype),
        homes=HOMES[case.case],
        durability=int(case.durability) if case.durability.isdigit() else case.durability,  # type: ignore[arg-type]
        verify=case.verify,
        update=case.update,  # type: ignore[arg-type]
    )
    with OffloadEngine(model, AdamW(lr=LR, weight_decay=WEIGHT_DECAY), config) as engine:

        def step(ids: Tensor, targets: Tensor) -> float:
            before_s = spent_s()
            loss = engine(ids, targets)
            engine.backward(loss)
            infos.append(engine.step())
            hashing_s.append(spent_s() - before_s)
            return loss.item()

        losses, seconds = _timed(case, next(engine.module.parameters()).device, step)
        parts = engine._parts
        work = step_work(
            parts.layouts,
            parts.plan.homes,
            one_memory=parts.device.one_memory,
            commit_interval=config.commit_interval,
            reuse_nbytes=parts.slots.capacity_nbytes,
        )
    return losses, seconds, work


def _timed(
    case: StepCase, device: torch.device | str, step: Callable[[Tensor, Tensor], float]
) -> tuple[list[float], list[float]]:
    """Losses and seconds of every step, warm-up included; a step ends with its loss on the host and the device idle."""
    corpus = text.standard_library()
    draws = torch.Generator().manual_seed(case.seed)
    losses, seconds = [], []
    for _ in range(case.warm_up + case.steps):
        windows = corpus.windows(draws, batch=case.batch, seq=case.seq).to(device)
        began = time.perf_counter()
        losses.append(step(windows[:, :-1].contiguous(), windows[:, 1:].contiguous()))
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        seconds.append(time.perf_counter() - began)
    return losses, seconds


if __name__ == "__main__":
    print(json.dumps(asdict(run(StepCase(**json.loads(sys.argv[1]))))))
