"""Measured steps beside their lower bound, regime by regime, and with each feature of the schedule switched off.

The bound's bytes are those of the placement, its compute that of the pacing, or of plain torch in the same run where
the regime multiplies true matrices. Where a norm must be known first, the bound is that of the phases.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy
import torch
from torch import Tensor

from offload import AdamW, BudgetTooSmall, OffloadEngine, StepInfo
from offload.bound import SERIAL, Bound, lower_bound, step_work, update_share
from offload.scheduler.trace import LANES

from .paced import PacedConfig
from .regimes import STATES_PER_ELEMENT, Regime

AMPLE = 256 << 20
_WINDOW = 4  # units that have room where they must be fetched: one in use, the others on their way
MAX_NORM = 1e6  # a norm is waited for; whether it clips makes no difference to the schedule


@dataclass(frozen=True, kw_only=True)
class Feature:
    """One row of a regime: the schedule as it is, in another mode, or without one of its features.

    Args:
        name: as the table shows it.
        update: when units are updated.
        clips: whether a norm must be known before anything is updated for good.
        durability: as in `OffloadConfig`.
        in_turns: the drive never reads and writes at the same time.
        smallest: budgets that leave room for one unit and one chunk only.
        horizontal: micro-batches go through the model one after another.
        own_bound: whether the row's bound is that of its own mode, and not that of the schedule as it is.
    """

    name: str
    update: str = "next_forward"
    clips: bool = True
    durability: str = "none"
    in_turns: bool = False
    smallest: bool = False
    horizontal: bool = False
    own_bound: bool = False

    def applies(self, regime: Regime) -> bool:
        """Whether the regime has what the feature is about."""
        return not (
            (self.in_turns and not (regime.uses_nvme and regime.law == "duplex"))
            or (self.smallest and not (regime.uses_nvme or regime.link))
            or (self.horizontal and regime.micro_batches == 1)
            or (self.durability != "none" and not regime.uses_nvme)
        )


AS_IT_IS = Feature(name="update in the next forward")
FEATURES = (
    AS_IT_IS,
    Feature(name="no clipping, update in backward", update="backward", clips=False, own_bound=True),
    Feature(name="speculative, every step durable", update="speculative", durability="step", own_bound=True),
    Feature(name="off: step() waits", update="step"),
    Feature(name="off: duplex", in_turns=True),
    Feature(name="off: window, one unit", smallest=True),
    Feature(name="off: vertical", horizontal=True),
)


@dataclass(frozen=True, kw_only=True)
class ScheduleRow:
    """One case. Seconds of a step as (p20, median, p80); `exposed_s` is the mean over steps, by lane.

    `bound_s` is the bound that holds for the mode, with all features; `global_s` the slowest lane over the whole step,
    `lane` its name.
    """

    regime: str
    feature: str
    step_s: tuple[float, float, float]
    bound_s: float
    global_s: float
    lane: str
    exposed_s: dict[str, float]
    busy_s: dict[str, float]

    @property
    def bound_ratio(self) -> float:
        return self.step_s[1] / self.bound_s


def measure_schedule(
    regimes: Sequence[Regime],
    features: Sequence[Feature],
    on_case: Callable[[str], None],
    *,
    steps: int = 5,
    warm_up: int = 2,
) -> Iterator[ScheduleRow]:
    """Run every regime with every feature that applies to it, in this process and with one compute thread; each row as
    soon as it is measured."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the other core is for everything that the schedule hides behind compute
    try:
        for regime in regimes:
            seconds = compute_seconds(regime)
            for feature in features:
                if feature.applies(regime):
                    on_case(f"{regime.name}: {feature.name}")
                    bound = bound_of(regime, seconds, feature if feature.own_bound else AS_IT_IS)
                    yield _measure(regime, feature, bound, steps, warm_up)
    finally:
        torch.set_num_threads(num_threads)


def compute_seconds(regime: Regime, repeats: int = 5) -> tuple[float, float]:
    """Compute seconds of a step's forward and of what follows it: recomputation and backward.

    Paced compute is what the regime says; true products are timed in plain torch, the median of `repeats`.
    """
    if regime.rows is None:
        return regime.compute_s / 4, regime.compute_s * 3 / 4
    model, batch = regime.model(), batch_of(regime)
    forward, backward = [], []
    for _ in range(repeats + 1):
        began_s = time.perf_counter()
        loss = model(batch)
        middle_s = time.perf_counter()
        loss.backward()
        forward.append(middle_s - began_s)
        backward.append(time.perf_counter() - middle_s)
        model.zero_grad()
    forward_s = float(numpy.median(forward[1:]))
    return forward_s, forward_s + float(numpy.median(backward[1:]))


def batch_of(regime: Regime) -> Tensor:
    """[B, width] in the dtype that the regime computes in."""
    draws = torch.Generator().manual_seed(0)
    return torch.randn(regime.rows or 1, regime.width, generator=draws).to(dtype_of(regime))


def dtype_of(regime: Regime) -> torch.dtype:
    """bfloat16, but float32 for true products: without hardware for it bfloat16 would hide everything else."""
    return torch.bfloat16 if regime.rows is None else torch.float32


def bound_of(regime: Regime, seconds: tuple[float, float], feature: Feature = AS_IT_IS) -> Bound:
    """The bound of a step in the mode of `feature`, for the placement that an engine makes.

    Args:
        seconds: compute of a step, see `compute_seconds`.
    """
    with OffloadEngine(regime.model(), AdamW(lr=1e-5), config_of(regime, feature)) as engine:
        parts = engine._parts
        work = step_work(
            parts.layouts,
            parts.plan.homes,
            one_memory=parts.device.one_memory,
            micro_batches=regime.micro_batches,
            commit_interval=engine.config.commit_interval,
            reuse_nbytes=parts.slots.capacity_nbytes,
        )
    alpha = update_share(feature.update, clips=feature.clips)
    return lower_bound(work, regime.rig(), forward_s=seconds[0], backward_s=seconds[1], alpha=alpha)


def config_of(regime: Regime, feature: Feature) -> PacedConfig:
    """The engine's configuration: ample memory, but room for a few units only where units have to be fetched."""
    rig = regime.rig()
    if feature.in_turns and rig.drive is not None:
        rig = replace(rig, drive=replace(rig.drive, law="additive"))
    config = PacedConfig(
        rig=rig,
        small_chunk=regime.width**2 // regime.chunks,
        nvme="a-rig" if regime.uses_nvme else None,
        host_memory=AMPLE,
        device_memory=_WINDOW * _unit_nbytes(regime) if regime.link else "auto",
        dtype=dtype_of(regime),
        homes=regime.homes,
        micro_batches=regime.micro_batches,
        clip_grad_norm=MAX_NORM if feature.clips else None,
        durability=feature.durability,  # type: ignore[arg-type]
        activation_memory=0,  # the bound's compute has the recomputation
        update=feature.update,  # type: ignore[arg-type]
    )
    if feature.smallest:
        config = replace(config, device_memory=_unit_nbytes(regime) if regime.link else "auto")
        return replace(config, host_memory=_least_host_nbytes(regime, config))
    if regime.homes["param"] == "nvme":
        room = _WINDOW * (_unit_nbytes(regime) + STATES_PER_ELEMENT * regime.width**2)
        return replace(config, host_memory=_least_host_nbytes(regime, config) + room)
    return config


def _unit_nbytes(regime: Regime) -> int:
    return regime.width**2 * dtype_of(regime).itemsize


def _least_host_nbytes(regime: Regime, config: PacedConfig) -> int:
    """The smallest host memory in which the engine works."""
    try:
        OffloadEngine(regime.model(), AdamW(lr=1e-5), replace(config, host_memory=1)).close()
    except BudgetTooSmall as problem:
        return problem.needed_nbytes
    raise AssertionError("no engine works in one byte")


def _measure(regime: Regime, feature: Feature, bound: Bound, steps: int, warm_up: int) -> ScheduleRow:
    with OffloadEngine(regime.model(), AdamW(lr=1e-5), config_of(regime, feature)) as engine:
        infos = [_step(engine, regime, feature) for _ in range(warm_up + steps)][warm_up:]
    return row_of(regime, feature, bound, infos)


def _step(engine: OffloadEngine, regime: Regime, feature: Feature) -> StepInfo:
    batch = batch_of(regime)
    if regime.micro_batches > 1 and not feature.horizontal:
        return engine.train_step([batch] * regime.micro_batches)
    for _ in range(regime.micro_batches):
        engine.backward(engine(batch) / regime.micro_batches)
    return engine.step()


def row_of(regime: Regime, feature: Feature, bound: Bound, infos: Sequence[StepInfo]) -> ScheduleRow:
    """The row of the steps `infos`."""
    low, middle, high = (float(q) for q in numpy.percentile([info.seconds for info in infos], (20, 50, 80)))
    return ScheduleRow(
        regime=regime.name,
        feature=feature.name,
        step_s=(low, middle, high),
        bound_s=bound.bound_s,
        global_s=bound.global_s,
        lane=bound.lane,
        exposed_s={lane: float(numpy.mean([info.exposed_s[lane] for info in infos])) for lane in LANES},
        busy_s={lane: bound.busy_s[lane] for lane in SERIAL},
    )


SHOWN = [lane for lane in LANES if lane != "compute"]


def head() -> list[str]:
    """The first two lines of the table, in Markdown."""
    names = ["regime", "schedule", "step s [p20, p80]", "bound s", "ratio", "global s", "slowest lane"]
    names += [f"waits {lane}" for lane in SHOWN]
    return ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]


def line(row: ScheduleRow) -> str:
    """One line of the table, in Markdown."""
    low, middle, high = row.step_s
    cells = [
        row.regime,
        row.feature,
        f"{middle:.3f} [{low:.3f}, {high:.3f}]",
        f"{row.bound_s:.3f}",
        f"{row.bound_ratio:.2f}",
        f"{row.global_s:.3f}",
        row.lane,
        *(f"{row.exposed_s[lane]:.3f}" for lane in SHOWN),
    ]
    return "| " + " | ".join(cells) + " |"
