"""One engine's steps in virtual time: its own schedule on a machine that is only described.

The plan, homes, residency, gradients, updates and commits are the engine's classes, unchanged. What is replaced lies
below and above them: lanes that only take time (`scheduler.virtual`), buffers without bytes (the meta device), and a
training thread that sleeps where the model would compute.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .assembly import _make_homes, _plan
from .bound import Bound, lower_bound, step_work, update_share
from .config import OffloadConfig
from .durable import CommitLog
from .early import EarlyUpdates
from .gradients import MAX_IN_FLIGHT, Gradients
from .homes import ChunkStream, gather_all
from .journey import Journeys
from .layout import Chunk, ChunkArrays
from .optimizers import OptimizerSpec
from .order import UseOrder
from .residency import Residency, update_window_nbytes
from .scheduler.devices import Device, Event, HostEvent
from .scheduler.fence import Fence
from .scheduler.lanes import Lane
from .scheduler.pool import Lease, Pool, PoolStatistics
from .scheduler.rig import GB, Rig
from .scheduler.storage import NEEDED_LATER, NEEDED_SOON, DriveQueue, DriveTuning
from .scheduler.trace import Span, Trace, Wait, busy_s, exposed_s, moved_nbytes
from .scheduler.virtual import (
    Channel,
    Service,
    SimulatedDrive,
    SimulatedLanes,
    Together,
    VirtualLoopThread,
)
from .step import Stepper
from .turns import Round, Stay
from .units import CallSite, ParameterInfo
from .updates import PendingUpdates
from .usage import CallLedger

Seconds = Callable[[CallSite], tuple[float, float]]
"""Seconds that one micro-batch computes in a call of the site: in forward, and in backward with its recomputation."""

MAX_IO_THREADS = 8  # in each direction of the drive
MAX_IN_FLIGHT_NBYTES = 256 << 20  # of one drive, as the store has it


@dataclass(frozen=True, kw_only=True)
class SimulatedStep:
    """One step on the virtual clock.

    Attributes:
        seconds: from the end of the step before it to its own.
        compute_s: of these, seconds in which the model computed.
        nbytes, busy_s, exposed_s: by lane, as in `StepInfo`.
        waited_s: seconds that the training thread stood still, by the name of the unit ("step" for the update).
        spans, waits: the record behind these figures.
    """

    seconds: float
    compute_s: float
    nbytes: Mapping[str, int]
    busy_s: Mapping[str, float]
    exposed_s: Mapping[str, float]
    waited_s: Mapping[str, float]
    spans: Sequence[Span]
    waits: Sequence[Wait]


class SimulatedDevice(Device):
    """Buffers without bytes, copies without work: the lanes take the time."""

    name = "simulated"

    def __init__(self, loop: VirtualLoopThread, rig: Rig) -> None:
        self.torch_device = torch.device("meta")
        self.one_memory = rig.one_memory
        self._loop = loop
        self._nbytes = rig.sizes.device

    def allocate(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device="meta")

    def allocate_host(self, nbytes: int) -> Tensor:
        return self.allocate(nbytes)

    def upload(self, device_buffer: Tensor, host_buffer: Tensor, after: Fence | None) -> None:
        return

    def download(self, host_buffer: Tensor, device_buffer: Tensor, after: Fence | None) -> None:
        return

    def record(self) -> Event:
        return HostEvent(self._loop.time())  # the simulated thread records when the compute before it has passed

    def free_nbytes(self) -> int | None:
        return None if self.one_memory else self._nbytes


class SimulatedStore:
    """The part of the store that takes time: requests in the order of the drive's queue, and a commit's flush."""

    def __init__(self, lanes: SimulatedLanes, tuning: DriveTuning, flush_s: float) -> None:
        self.step: int | None = None
        self._lanes = lanes
        self._tuning = tuning
        self._flush_s = flush_s
        self._sealed: asyncio.Future[None] | None = None
        self._queue = DriveQueue(
            "the simulated drive",
            depth=2 * tuning.depth,
            lane_depth=min(lanes.read.num_threads, tuning.depth + 1),
            max_in_flight_nbytes=MAX_IN_FLIGHT_NBYTES,
        )

    async def read(self, key: str, piece: int, buffer: Tensor, *, needed: int = NEEDED_SOON) -> None:
        await self._move(self._lanes.read, key, buffer.numel(), needed)

    async def write(self, key: str, piece: int, buffer: Tensor, *, needed: int = NEEDED_LATER) -> None:
        while self._sealed is not None:
            await asyncio.shield(self._sealed)
        await self._move(self._lanes.write, key, buffer.numel(), needed)

    async def commit(self, step: int, extra: Mapping[str, Any] | None = None, *, force: bool = False) -> bool:
        sealed = self._sealed = asyncio.get_running_loop().create_future()
        await asyncio.sleep(self._flush_s)
        self._sealed = None
        sealed.set_result(None)
        self.step = step
        return True

    async def _move(self, lane: Lane, key: str, nbytes: int, needed: int) -> None:
        unit, _, kind = key.rpartition("/")
        size = self._tuning.job_nbytes(nbytes)
        await gather_all(
            self._queue.run(
                lane, _nothing, unit=unit, kind=kind, nbytes=min(size, nbytes - first), needed=needed, label=key
            )
            for first in range(0, nbytes, size)
        )


def _nothing() -> None:
    return


class _Record(Trace):
    """A trace on the virtual clock: waits are those that the simulated thread saw, not what real clocks say of them."""

    def add_wait(self, wait: Wait) -> None:
        return

    def waited(self, wait: Wait) -> None:
        super().add_wait(wait)


class _SimulatedGradients(Gradients):
    """Gradients whose values nobody knows: the norm is finite, and too small to be clipped."""

    def __init__(self, loop: VirtualLoopThread, **parts: Any) -> None:
        super().__init__(loop=loop, **parts)
        self._slots = loop.semaphore(MAX_IN_FLIGHT)  # type: ignore[assignment]

    def wait(self) -> None:
        for future in self._in_flight:
            future.exception()
        super().wait()

    def total_square(self, names_in_order: Sequence[nn.Parameter]) -> float:
        return 0.0


class Simulation:
    """An engine for `module` on `rig`, and the training loop that uses it.

    Args:
        module: built on the meta device; it is changed (its parameters take their compute dtypes).
        spec: what is optimised with; its arithmetic does not run.
        config: see `simulated_config`. Clipping never clips: the values of gradients are not known.
        seconds: what calls compute.
        call_s: seconds that the training thread spends on each call besides.
        vertical: all micro-batches of a step go through the units together, as in `OffloadEngine.train_step`.
        flush_s: seconds that a drive takes to flush, per commit.
        max_turns: of the loop, that one wait of the training thread may take.

    Raises: ValueError (BudgetTooSmall among them) as the engine does.
    """

    def __init__(
        self, module: nn.Module, spec: OptimizerSpec, rig: Rig, config: OffloadConfig, seconds: Seconds,
        *, call_s: float = 0.0, vertical: bool = True, flush_s: float = 0.0, max_turns: int = 20_000_000,
    ) -> None:  # fmt: skip
        self.rig = rig
        self.config = config
        self._seconds = seconds
        self._call_s = call_s
        self._vertical = vertical and config.micro_batches > 1
        self._thread = VirtualLoopThread(max_turns)
        device = SimulatedDevice(self._thread, rig)
        parameters = _parameters(module, config.dtype)
        groups = spec.make_groups(parameters)
        host_nbytes = config.host_budget_nbytes()
        device_nbytes = config.device_budget_nbytes(device)
        self.partition, self.layouts, self.plan = _plan(
            module, parameters, spec, config, device, host_nbytes, device_nbytes
        )
        self._groups = groups
        self._trace = _Record()
        self._lanes = _lanes(self._trace, rig)
        plan = self.plan
        self.rest = Pool("host_memory", plan.rest_nbytes, device.allocate_host)
        self.ring = Pool("host_memory (chunks on their way)", plan.ring_nbytes, device.allocate_host)
        self.stage = Pool("host_memory (units on their way)", plan.stage_nbytes, device.allocate_host)
        self.slots = self.stage if device.one_memory else Pool("device_memory", plan.device_nbytes, device.allocate)
        store = SimulatedStore(self._lanes, DriveTuning(), flush_s) if rig.drive is not None else None
        self._leases: list[Lease] = []
        homes, resting = _make_homes(self.layouts, plan, self.rest, store, store, self._leases)  # type: ignore[arg-type]
        sites = self.partition.call_sites
        forward = [unit.index for site in sites for unit in site.units]
        self._order = UseOrder({"train": forward + forward[::-1]})
        stream, updates = ChunkStream(self.ring, self._lanes), PendingUpdates()
        journeys = Journeys(self.layouts, homes, resting, device, self._lanes, self.stage, stream, updates)
        self._residency = Residency(
            self.layouts, device, self._thread, self.slots, self._order, journeys, updates,
            update_window_nbytes(plan.ring_nbytes), self._trace,
        )  # fmt: skip
        room = self._residency.make_room if device.one_memory else self.stage.acquire
        self._gradients = _SimulatedGradients(
            self._thread, layouts=self.layouts, homes=homes, device=device, lanes=self._lanes, room=room,
            micro_batches=config.micro_batches, settled=self._residency.settled,
        )  # fmt: skip
        self._stepper = Stepper(spec, parameters, self.layouts, self._gradients)
        self._log = None
        if store is not None and config.commit_interval is not None:
            self._log = CommitLog(store, self.layouts, homes, self._thread, config.commit_interval)  # type: ignore[arg-type]
        self._early = self._open_early()
        self._ledger = CallLedger()
        self._step = 0
        self._since_s = 0.0

    def _open_early(self) -> EarlyUpdates | None:
        """As the engine does."""
        mode = self._mode
        if mode not in ("backward", "speculative"):
            return None
        early = EarlyUpdates(
            self._stepper,
            self._residency,
            [layout.unit for layout in self.layouts],
            lambda: self._groups,
            self._thread,
            self._log,
            revocable=mode != "backward",
            only_if_usual=False,  # no step is clipped or skipped, so "auto" has come to that after its first steps
        )
        self._gradients.on_landing, self._gradients.on_complete = early.landing, early.complete
        return early

    @property
    def _mode(self) -> str:
        """What `update` comes to where no step is clipped or skipped."""
        if self.config.update == "auto":
            return "speculative" if self._log is not None and self.config.commit_interval == 1 else "next_forward"
        return self.config.update

    # -- the simulated training thread

    def run(self, num_steps: int = 4) -> SimulatedStep:
        """Train for `num_steps`; the first ones find everything cold and nothing to overlap with. Returns the last.

        Raises: Deadlock if the engine stands still for ever.
        """
        for _ in range(num_steps):
            if self._vertical:
                self._enter()
                self._pass_in_turns()
            else:
                for _ in range(self.config.micro_batches):
                    self._enter()
                    self._pass()
            self._enter()
            last = self._finish()
        return last

    def _enter(self) -> None:
        if self._log is not None:
            self._log.launch(dict)

    def _pass(self) -> None:
        """A forward and a backward of one micro-batch."""
        self._order.begin("train")
        self._residency.ask_prefetch()
        sites = self.partition.call_sites
        for site in sites:
            self._call(site, self._seconds(site)[0])
            self._ledger.made(site)
        for site in reversed(sites):
            self._call(site, self._seconds(site)[1])
            self._ledger.done(site)
            self._send_gradients(site)
        self._gradients.end_backward()

    def _pass_in_turns(self) -> None:
        """A forward and a backward of all micro-batches, which visit each unit one after another."""
        self._order.begin("train")
        self._residency.ask_prefetch()
        num, stay = self.config.micro_batches, Stay(self._residency)
        sites = self.partition.call_sites
        self._gradients.begin_turns(num, self._ledger.pending)
        for site in sites:
            with self._waiting(site.units[0].name):
                stay.begin(Round(site, num))
            for number in range(num):
                self._compute(site, self._seconds(site)[0])
                self._ledger.made(site, number)
            stay.end()
        for site in reversed(sites):
            with self._waiting(site.units[0].name):
                stay.begin(Round(site, num))
            for number in range(num):
                self._compute(site, self._seconds(site)[1])
                self._take_gradients(site, number)
                self._ledger.done(site, number)
                if number == num - 1:
                    stay.end()
                for unit in site.units:
                    with self._waiting(unit.name):
                        self._gradients.flush_turn(unit.index)
        self._gradients.end_backward()

    def _call(self, site: CallSite, seconds: float) -> None:
        with self._waiting(site.units[0].name):
            self._residency.acquire(site.units)
        self._compute(site, seconds)
        self._residency.release(site.units)

    def _compute(self, site: CallSite, seconds: float) -> None:
        if self._call_s:
            self._thread.sleep(self._call_s)
        start_s = self._thread.time()
        self._thread.sleep(seconds)
        self._trace.add(Span("compute", start_s, self._thread.time(), site.name, "call", 0, start_s))

    def _take_gradients(self, site: CallSite, micro_batch: int) -> None:
        for parameter in site.module.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
                self._gradients.take(parameter, micro_batch)

    def _send_gradients(self, site: CallSite) -> None:
        self._take_gradients(site, 0)
        for unit in site.units:
            with self._waiting(unit.name):
                self._gradients.flush(unit.index, self._ledger.pending(unit.index))

    def _finish(self) -> SimulatedStep:
        """The step, as the engine takes it."""
        with self._waiting("step"):
            may_skip = self.config.update != "backward"
            decision = self._stepper.decide(1.0, self.config.clip_grad_norm, None, may_skip=may_skip)
            begun = self._early.decided(decision.grad_scale, decision.skipped) if self._early is not None else {}
            self._residency.settle([layout.unit for layout in self.layouts if layout.unit.index not in begun])
            prepared = self._stepper.prepare(self._groups, decision.grad_scale, begun)
            made = self._residency.expect(prepared.updates, self._log.under_way if self._log is not None else None)
            self._stepper.book(prepared)
            if self._early is not None:
                self._early.keep()
            self._gradients.drop()
            self._step += 1
            if self._log is not None:
                self._log.changed({**begun, **made})
                self._log.stage(self._step, {})
            if self.config.update == "step":
                self._residency.settle()
        report = self._account()
        self._residency.ask_prefetch()
        return report

    @property
    def time_s(self) -> float:
        """Virtual seconds since the start."""
        return self._thread.time()

    def bound(self) -> Bound:
        """The lower bound of a step under this plan, on this rig."""
        config, sites = self.config, self.partition.call_sites
        forward_s = sum(self._seconds(site)[0] for site in sites)
        backward_s = sum(self._seconds(site)[1] for site in sites)
        num = config.micro_batches
        work = step_work(
            self.layouts,
            self.plan.homes,
            one_memory=self.rig.one_memory,
            micro_batches=num,
            vertical=self._vertical or num == 1,
            commit_interval=config.commit_interval,
            reuse_nbytes=self.slots.capacity_nbytes,
        )
        first_s = forward_s * (num if self._vertical else 1)
        return lower_bound(
            work,
            self.rig,
            forward_s=first_s,
            backward_s=num * (forward_s + backward_s) - first_s,
            alpha=update_share(self._mode, clips=config.clip_grad_norm is not None),
        )

    @contextlib.contextmanager
    def _waiting(self, unit: str) -> Iterator[None]:
        start_s = self._thread.time()
        yield
        if self._thread.time() > start_s:
            self._trace.waited(Wait(start_s, self._thread.time(), unit))

    def _account(self) -> SimulatedStep:
        spans, waits = self._trace.drain()
        now_s = self._thread.time()
        seconds, self._since_s = now_s - self._since_s, now_s
        waited_s: defaultdict[str, float] = defaultdict(float)
        for wait in waits:
            waited_s[wait.unit] += wait.end_s - wait.start_s
        busy = busy_s(spans)
        return SimulatedStep(
            seconds=seconds,
            compute_s=busy["compute"],
            nbytes=moved_nbytes(spans),
            busy_s=busy,
            exposed_s=exposed_s(spans, waits),
            waited_s=dict(waited_s),
            spans=spans,
            waits=waits,
        )

    # -- what it leaves

    def pools(self) -> dict[str, PoolStatistics]:
        """The pools of the engine by name."""
        return {pool.name: pool.statistics() for pool in (self.rest, self.ring, self.stage, self.slots)}

    def settle(self) -> None:
        """Let everything under way end, then take all units off the device: pools hold what rests, and no more."""
        self._residency.settle()
        if self._log is not None:
            self._log.launch(dict)
            self._log.wait()
        self._thread.run(self._residency.withdraw([layout.unit for layout in self.layouts]))

    def close(self) -> None:
        self._thread.close()

    def __enter__(self) -> Simulation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def simulated_config(rig: Rig, **settings: Any) -> OffloadConfig:
    """The configuration of an engine that has all of `rig`; `settings` are those of `OffloadConfig`.

    Raises: ValueError as `OffloadConfig` does.
    """
    own: dict[str, Any] = {"host_memory": rig.sizes.host, "nvme": Path("simulated") if rig.drive is not None else None}
    if rig.link is not None:
        own["device_memory"] = rig.sizes.device
    elif settings.get("device_memory", "auto") != "auto":
        raise ValueError(
            f"device_memory={settings['device_memory']!r}, but on {rig.name!r} device and host are the same memory; "
            "set host_memory only"
        )
    return OffloadConfig(**{**own, **settings})


def _parameters(module: nn.Module, dtype: torch.dtype) -> list[ParameterInfo]:
    """As `collect_parameters`, for parameters without values. Raises: ValueError for one that has some."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    infos = []
    for parameter, its_names in names.items():
        if parameter.device.type != "meta":
            raise ValueError(
                f"parameter {its_names[0]!r} is on {parameter.device}; build the model under torch.device('meta') to "
                f"simulate it"
            )
        own = dtype if parameter.dtype.is_floating_point and parameter.dtype.itemsize > 1 else parameter.dtype
        parameter.data = parameter.data.to(own)
        infos.append(ParameterInfo(parameter, tuple(its_names), own, parameter.shape, parameter.requires_grad))
    return infos


def _lanes(trace: Trace, rig: Rig) -> SimulatedLanes:
    """The lanes of `rig`; what they move also passes through its host memory."""
    memory = _bandwidth(rig.cores.dram_gb_s)
    services: dict[str, Service] = {"cpu": _Cores(rig, memory)}
    num_threads = {"cpu": rig.cores.count, "read": 1, "write": 1, "h2d": 1, "d2h": 1}
    if rig.drive is not None:
        drive = SimulatedDrive(rig.drive)
        for name in ("read", "write"):
            services[name] = Together(drive.direction(name), memory)
            num_threads[name] = min(MAX_IO_THREADS, rig.drive.depth)
    if rig.link is not None:
        services["h2d"] = Together(_bandwidth(rig.link.h2d_gb_s), memory)
        services["d2h"] = Together(_bandwidth(rig.link.d2h_gb_s), memory)
    return SimulatedLanes(trace, services, num_threads)


def _bandwidth(gb_s: float) -> Channel:
    return Channel(lambda args, kind, nbytes: nbytes / (gb_s * GB))


class _Cores:
    """An update keeps one core busy, by its elements. What host kernels read and write passes through host memory."""

    def __init__(self, rig: Rig, memory: Channel) -> None:
        self._update_elements_s = rig.cores.update_elements_s
        self._memory = memory

    def book(self, now_s: float, args: tuple[Any, ...], kind: str, nbytes: int) -> float:
        end_s = now_s
        read_only_nbytes = 0
        if len(args) == 2 and isinstance(args[0], Chunk) and isinstance(args[1], ChunkArrays):
            chunk, arrays = args
            end_s += chunk.numel / self._update_elements_s
            read_only_nbytes = arrays.grad.nbytes if arrays.grad is not None else 0
        return max(end_s, self._memory.book(now_s, args, kind, 2 * nbytes - read_only_nbytes))
