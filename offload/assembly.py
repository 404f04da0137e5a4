"""Builds an engine's parts from module, optimizer and configuration: units, layouts, plan, pools, homes, store."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from .config import OffloadConfig
from .homes import DeviceRing, Home
from .kernels.dispatch import implementation, tune_once
from .layout import KINDS, UnitLayout
from .optimizers import OptimizerSpec, WholeParameterSpec
from .plan import PLACED_KINDS, BudgetTooSmall, Plan, Planner, device_chunks
from .scheduler.devices import Device
from .scheduler.lanes import Lanes
from .scheduler.pool import Lease, Pool, page_ceil
from .store import Extent, Store
from .units import ParameterInfo, Partition, collect_parameters, partition
from .update import AVERAGE

SCRATCH_FOLDER = "offload-scratch"


@dataclass(eq=False, kw_only=True)
class Assembly:
    """The parts, made once. `close()` gives everything back."""

    config: OffloadConfig
    host_budget_nbytes: int
    device: Device
    parameters: Sequence[ParameterInfo]
    groups: list[dict[str, Any]]
    partition: Partition
    layouts: Sequence[UnitLayout]
    plan: Plan
    lanes: Lanes
    rest: Pool
    ring: Pool
    stage: Pool
    slots: Pool
    device_ring: DeviceRing
    homes: Sequence[dict[str, Home]]
    resting: Sequence[Tensor | None]
    store: Store | None
    scratch: Store | None
    leases: list[Lease]

    def close(self) -> None:
        self.lanes.close()
        for store in (self.store, self.scratch):
            if store is not None:
                store.close()
        for lease in self.leases:
            lease.release()
        self.leases.clear()
        for pool in (self.rest, self.ring, self.stage, self.slots, self.device_ring.pool):
            pool.close()


def assemble(module: nn.Module, spec: OptimizerSpec, config: OffloadConfig) -> Assembly:
    """Plan first, then allocate. On any failure everything made so far is given back.

    Raises: ValueError (BudgetTooSmall among them) for what the user can mend; OSError from the store.
    """
    device = config.open_device()
    implementation()  # compiles, where that is still to be done, what else the first step would wait for
    if config.device_share:
        tune_once(device.torch_device)
    parameters = collect_parameters(module, config.dtype, config.keep_fp32, config.trainable)
    if config.device_share and isinstance(spec, WholeParameterSpec):
        raise ValueError(
            f"update_on={config.update_on!r}, but {spec!r} steps over whole parameters in host memory; leave "
            'update_on="host"'
        )
    groups = spec.make_groups(parameters)
    host_nbytes = config.host_budget_nbytes()
    device_nbytes = config.device_budget_nbytes(device)
    parts, layouts, plan = _plan(module, parameters, spec, config, device, host_nbytes, device_nbytes)
    lanes = config.open_lanes()
    with contextlib.ExitStack() as undo:
        undo.callback(lanes.close)
        poison = _poison if device.poison() else None
        rest = Pool("host_memory", plan.rest_nbytes, device.allocate_host, device.release_host)
        ring = Pool(
            "host_memory (chunks on their way)", plan.ring_nbytes, device.allocate_host, device.release_host, poison
        )
        stage = Pool(
            "host_memory (units on their way)", plan.stage_nbytes, device.allocate_host, device.release_host, poison
        )
        slots = stage if device.one_memory else _device_pool("device_memory", plan.device_nbytes, device)
        device_ring = DeviceRing(
            device,
            _device_pool("device_memory (chunks on their way)", plan.device_ring_nbytes, device),
            frozenset(device_chunks(layouts, config.device_share)),
        )
        extents = list(_extents(layouts, plan, config.commit_interval))
        store, scratch = _open_stores(config, extents, _identity(parameters, spec, config), lanes, undo)
        leases: list[Lease] = []
        homes, resting = _make_homes(layouts, plan, rest, store, scratch, leases)
        undo.pop_all()
    return Assembly(
        config=config,
        host_budget_nbytes=host_nbytes,
        device=device,
        parameters=parameters,
        groups=groups,
        partition=parts,
        layouts=layouts,
        plan=plan,
        lanes=lanes,
        rest=rest,
        ring=ring,
        stage=stage,
        slots=slots,
        device_ring=device_ring,
        homes=homes,
        resting=resting,
        store=store,
        scratch=scratch,
        leases=leases,
    )


def _plan(
    module: nn.Module,
    parameters: Sequence[ParameterInfo],
    spec: OptimizerSpec,
    config: OffloadConfig,
    device: Device,
    host_nbytes: int,
    device_nbytes: int,
) -> tuple[Partition, list[UnitLayout], Plan]:
    """The coarsest partition that fits the budgets, and its plan.

    Raises: BudgetTooSmall with the smallest budget over all partitions.
    """
    slots = spec.slots(parameters) if isinstance(spec, WholeParameterSpec) else None
    failures: list[BudgetTooSmall] = []
    largest = None
    while True:
        parts = partition(module, parameters, None if largest is None else largest - 1, config.units)
        layouts = [
            UnitLayout(unit, state_names(spec, config), config.micro_batches > 1, config.chunk_numel(), slots)
            for unit in parts.units
        ]
        planner = Planner(
            layouts,
            parts.call_sites,
            host_nbytes=host_nbytes,
            device_nbytes=device_nbytes,
            one_memory=device.one_memory,
            has_nvme=bool(config.nvme_directories),
            forced=config.homes,
            device_share=config.device_share,
        )
        try:
            return parts, layouts, planner.make()
        except BudgetTooSmall as failure:
            failures.append(failure)
        previous, largest = largest, max((unit.numel for unit in parts.units), default=0)
        if largest == previous or largest == 0:  # the largest unit is one module that cannot be taken apart
            # A cut that failed on the host had passed on the device, so it is the host's budget that is in the way.
            host = [failure for failure in failures if failure.setting == "host_memory"]
            raise min(host or failures, key=lambda failure: failure.needed_nbytes) from None


def _device_pool(name: str, nbytes: int, device: Device) -> Pool:
    return Pool(name, nbytes, device.allocate, None, _poison if device.poison() else None, device.record)


def _poison(buffer: Tensor) -> None:
    buffer.fill_(0xFF)


def _open_stores(
    config: OffloadConfig,
    extents: Sequence[Extent],
    identity: dict[str, Any],
    lanes: Lanes,
    undo: contextlib.ExitStack,
) -> tuple[Store | None, Store | None]:
    """The store, and the one for scratch (gradients), which no step needs after it: one and the same unless steps are
    to survive. Apart from each other, a run may resume under a plan that spills other gradients, or none."""
    directories = config.nvme_directories
    for directory in directories:
        if directory.exists() and not directory.is_dir():
            raise ValueError(f"nvme directory {directory} is a file; name a directory on a drive")
    if config.commit_interval is None:
        store = _create(config, directories, extents, identity, lanes, undo, "none")
        return store, store
    kept = [extent for extent in extents if not extent.scratch]
    if config.resume:
        store = Store.reopen(
            directories,
            kept,
            identity,
            lanes,
            verify=config.verify,
            backend=config.backend_factory(),
            rated_nbytes=config.rated_endurance_nbytes,
        )
        undo.callback(store.close)
    else:
        store = _create(config, directories, kept, identity, lanes, undo, config.durability)
    spilled = [extent for extent in extents if extent.scratch]
    folders = [directory / SCRATCH_FOLDER for directory in directories]
    return store, _create(config, folders, spilled, identity, lanes, undo, "none")


def _create(
    config: OffloadConfig,
    directories: Sequence[Path],
    extents: Sequence[Extent],
    identity: dict[str, Any],
    lanes: Lanes,
    undo: contextlib.ExitStack,
    durability: Literal["step", "none"] | int,
) -> Store | None:
    if not extents:
        return None
    store = Store.create(
        directories,
        extents,
        identity,
        lanes,
        durability=durability,
        verify=config.verify,
        backend=config.backend_factory(),
        overwrite=config.overwrite,
        rated_nbytes=config.rated_endurance_nbytes,
    )
    undo.callback(store.close)
    return store


def _extents(layouts: Sequence[UnitLayout], plan: Plan, commit_interval: int | None) -> Iterator[Extent]:
    """What the store must hold: every (unit, kind) that the plan puts on NVMe, and, where steps are to survive, also
    those that rest in host memory. The latter are only written, until a run resumes."""
    for layout, homes in zip(layouts, plan.homes, strict=True):
        for kind in KINDS:
            mirrored = commit_interval is not None and kind != "grad"
            if (homes[kind] == "nvme" or mirrored) and layout.pieces[kind]:
                yield Extent(
                    key=f"{layout.unit.name}/{kind}",
                    unit=layout.unit.name,
                    kind=kind,
                    piece_nbytes=tuple(layout.pieces[kind]),
                    scratch=kind == "grad",
                    parameters=tuple(info.name for info in layout.unit.parameters),
                )


def _make_homes(
    layouts: Sequence[UnitLayout],
    plan: Plan,
    rest: Pool,
    store: Store | None,
    scratch: Store | None,
    leases: list[Lease],
) -> tuple[list[dict[str, Home]], list[Tensor | None]]:
    """A home for every (unit, kind), and each unit's staged form where that rests in host memory."""
    all_homes: list[dict[str, Home]] = []
    resting: list[Tensor | None] = []
    for layout, tiers in zip(layouts, plan.homes, strict=True):
        name = layout.unit.name
        buffers: dict[str, Tensor] = {}
        staged = None
        for kind in PLACED_KINDS:
            nbytes = layout.staged_nbytes if kind == "param" else layout.nbytes(kind)
            if tiers[kind] == "host":
                lease = rest.try_acquire(page_ceil(nbytes), f"{name}/{kind}")
                assert lease is not None, "the plan counts every byte that rests"
                leases.append(lease)
                buffers[kind] = lease.buffer[: layout.nbytes(kind)]
                if kind == "param":
                    staged = lease.buffer[:nbytes]
                    buffers["frozen"] = staged[layout.nbytes("param") :]
        resting.append(staged)
        all_homes.append(
            {
                kind: Home(
                    name,
                    kind,
                    layout.pieces[kind],
                    buffer=buffers.get(kind),
                    store=scratch if kind == "grad" else store,
                )
                for kind in KINDS
            }
        )
    return all_homes, resting


def state_names(spec: OptimizerSpec, config: OffloadConfig) -> tuple[str, ...]:
    """The fp32 arrays that are kept per trainable parameter: the optimizer's, and the moving average."""
    return (*spec.active_state_names(), *((AVERAGE,) if config.ema_decay is not None else ()))


def _identity(parameters: Sequence[ParameterInfo], spec: OptimizerSpec, config: OffloadConfig) -> dict[str, Any]:
    """What a store belongs to: the model's parameters and the optimizer."""
    table = {
        info.name: [list(info.shape), str(info.dtype), "trainable" if info.trainable else "frozen"]
        for info in parameters
    }
    optimizer = spec.describe()
    if config.ema_decay is not None:
        optimizer["states"] = [*optimizer["states"], AVERAGE]
    return {"parameters": table, "optimizer": optimizer}
