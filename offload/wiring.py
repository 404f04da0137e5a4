"""Connects an engine's working parts: what moves, computes, decides and remembers, around what `assembly.py` built."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .access import ParameterAccess
from .activations import ActivationBudget
from .assembly import Assembly
from .average import ShownAverage
from .bindings import Bindings
from .bound import EngineBound
from .checkpoint import Checkpoints
from .checkpoint.loading import RunFacts
from .durable import CommitLog, RunState
from .early import EarlyUpdates
from .engine_optimizer import EngineOptimizer, OptimizerHost
from .gradients import Gradients
from .homes import ChunkStream
from .journey import Journeys
from .loss_scale import LossScaling
from .optimizers import OptimizerSpec
from .order import UseOrder
from .record import StepRecord
from .residency import Residency, update_window_nbytes
from .runtime import CallRuntime
from .scheduler.loop import LoopThread
from .step import Stepper
from .takeover import Takeover
from .units import CallSite
from .updates import PendingUpdates
from .usage import ComputeRecord
from .values import Values
from .vertical import VerticalSchedule


class Facade(OptimizerHost, Protocol):
    """What the parts ask of the engine in front of them."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
    def backward(self, loss: Tensor) -> None: ...


@dataclass(frozen=True, eq=False, kw_only=True)
class Wiring:
    """The working parts of one engine. The loop's thread runs; nothing has been done to the module yet."""

    loop: LoopThread
    order: UseOrder
    updates: PendingUpdates
    residency: Residency
    gradients: Gradients
    stepper: Stepper
    scaling: LossScaling
    access: ParameterAccess
    bindings: Bindings
    runtime: CallRuntime
    vertical: VerticalSchedule
    values: Values
    average: ShownAverage
    optimizer: EngineOptimizer
    state: RunState
    log: CommitLog | None
    checkpoints: Checkpoints
    early: EarlyUpdates | None
    record: StepRecord
    takeover: Takeover


def wire(
    parts: Assembly,
    module: nn.Module,
    spec: OptimizerSpec,
    engine: Facade,
    *,
    check_open: Callable[[], None],
    read_private: Callable[[nn.Parameter], Tensor],
    before_write: Callable[[int], None],
    after_write: Callable[[int, bool], None],
) -> Wiring:
    """Make and connect the parts. On any failure the loop's thread is ended.

    Args:
        check_open: raises if the engine is closed or of no more use.
        read_private, before_write, after_write: see `Bindings` and `Values`.

    Raises: ValueError for a rig that cannot be read.
    """
    config = parts.config
    with contextlib.ExitStack() as undo:
        loop = LoopThread()
        undo.callback(loop.close)
        stream = ChunkStream(parts.ring, parts.lanes, parts.device_ring)
        order = UseOrder(_first_order(parts.partition.call_sites))
        updates = PendingUpdates()
        journeys = Journeys(
            parts.layouts, parts.homes, parts.resting, parts.device, parts.lanes, parts.stage, stream, updates
        )
        residency = Residency(
            parts.layouts,
            parts.device,
            loop,
            parts.slots,
            order,
            journeys,
            updates,
            update_window_nbytes(parts.plan.ring_nbytes),
            parts.lanes.trace,
        )
        gradients = Gradients(
            parts.layouts,
            parts.homes,
            parts.device,
            parts.lanes,
            loop,
            residency.make_room if parts.device.one_memory else parts.stage.acquire,
            config.micro_batches,
            residency.settled,
        )
        stepper = Stepper(spec, parts.parameters, parts.layouts, gradients, config.ema_decay)
        scaling = LossScaling(config.loss_scale, config.update == "backward")
        access = ParameterAccess(parts.layouts, parts.homes, stream, loop, parts.device.torch_device, residency.settled)
        bindings = Bindings(parts.parameters, parts.device.torch_device, read_private)
        compute = ComputeRecord(parts.lanes.trace)
        record = StepRecord(parts.lanes.trace, compute, _open_bound(parts))
        runtime = CallRuntime(
            parts.device,
            residency,
            bindings,
            gradients,
            compute,
            check_open,
            torch.get_num_threads(),
            config.micro_batches,
            ActivationBudget(config.activation_budget_nbytes(parts.device)),
            lambda found_inf, inverse: scaling.unscale(stepper.norm(), found_inf, inverse),
        )
        vertical = VerticalSchedule(
            engine,
            engine.backward,
            record.note_loss,
            module,
            parts.parameters,
            runtime,
            config.micro_batches,
            scaling.scaled,
        )
        values = Values(
            module,
            parts.parameters,
            parts.layouts,
            access,
            gradients,
            stepper,
            scaling,
            before_write,
            after_write,
            updates.spoilt,
        )
        average = ShownAverage(
            config.ema_decay is not None, parts.layouts, access, stepper, before_write, after_write, updates.spoilt
        )
        optimizer = EngineOptimizer(engine, spec, parts.groups)
        state = RunState(module, parts.parameters, parts.device, stepper, optimizer, scaling)
        log = _open_log(parts, loop)

        def facts() -> RunFacts:
            return RunFacts(
                parameters=parts.parameters,
                layouts=parts.layouts,
                optimizer=spec.describe(),
                groups=[group["params"] for group in optimizer.param_groups],
                buffers=state.buffers(),
            )

        checkpoints = Checkpoints(facts, access, state, updates, residency, journeys, loop)
        early = _open_early(parts, stepper, residency, optimizer, loop, log, scaling)
        if early is not None:
            gradients.on_landing, gradients.on_complete = early.landing, early.complete
        takeover = Takeover(module, parts, access, bindings, runtime, log if config.resume else None)
        undo.pop_all()
    return Wiring(
        loop=loop,
        order=order,
        updates=updates,
        residency=residency,
        gradients=gradients,
        stepper=stepper,
        scaling=scaling,
        access=access,
        bindings=bindings,
        runtime=runtime,
        vertical=vertical,
        values=values,
        average=average,
        optimizer=optimizer,
        state=state,
        log=log,
        checkpoints=checkpoints,
        early=early,
        record=record,
        takeover=takeover,
    )


def _open_log(parts: Assembly, loop: LoopThread) -> CommitLog | None:
    """The log of commits, where there is a store that outlives the process."""
    every = parts.config.commit_interval
    if parts.store is None or every is None:
        return None
    return CommitLog(parts.store, parts.layouts, parts.homes, loop, every)


def _open_bound(parts: Assembly) -> EngineBound | None:
    """What says how long a step takes at least, where the configuration names a rig."""
    config = parts.config
    rig = config.read_rig()
    if rig is None:
        return None
    return EngineBound(
        rig,
        parts.layouts,
        parts.plan.homes,
        one_memory=parts.device.one_memory,
        micro_batches=config.micro_batches,
        commit_interval=config.commit_interval,
        reuse_nbytes=parts.slots.capacity_nbytes,
        update=config.update,
        clips=config.clip_grad_norm is not None,
    )


def _open_early(
    parts: Assembly,
    stepper: Stepper,
    residency: Residency,
    optimizer: EngineOptimizer,
    loop: LoopThread,
    log: CommitLog | None,
    scaling: LossScaling,
) -> EarlyUpdates | None:
    """What begins updates in backward, where the configuration lets it."""
    mode = parts.config.update
    if mode in ("next_forward", "step") or (mode == "auto" and parts.config.commit_interval != 1):
        return None
    return EarlyUpdates(
        stepper,
        residency,
        [layout.unit for layout in parts.layouts],
        lambda: optimizer.param_groups,
        loop,
        log,
        revocable=mode != "backward",
        only_if_usual=mode == "auto",
        assumed_factor=lambda: scaling.expected_inverse,
    )


def _first_order(sites: tuple[CallSite, ...]) -> dict[str, list[int]]:
    """Before the first pass: order of registration, and back."""
    forward = [unit.index for site in sites for unit in site.units]
    return {"train": forward + forward[::-1], "eval": forward}
