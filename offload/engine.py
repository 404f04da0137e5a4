"""`OffloadEngine`: trains a module whose parameters, gradients and states live wherever there is room."""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .access import HostParameter, ParameterAccess
from .activations import ActivationBudget
from .assembly import assemble
from .bindings import Bindings
from .bound import EngineBound
from .calls import UnitForward
from .config import OffloadConfig
from .durable import CommitLog, RunState
from .early import EarlyUpdates
from .engine_optimizer import EngineOptimizer
from .gradients import Gradients
from .guards import Guards
from .homes import ChunkStream
from .hostheap import bound_heap, trim_heap
from .info import MemoryReport, StepInfo
from .journey import Journeys
from .optimizers import OptimizerSpec
from .order import UseOrder
from .report import memory_report, unit_table
from .residency import Residency
from .runtime import CallRuntime
from .scheduler.chrome import ChromeTrace, TracedStep
from .scheduler.loop import LoopThread
from .scheduler.trace import Wait, busy_s, exposed_s, moved_nbytes
from .step import Decision, Stepper, clip_factor
from .units import CallSite
from .updates import PendingUpdates
from .usage import ComputeRecord
from .values import Values
from .vertical import LossFn, VerticalSchedule

MIN_UPDATE_WINDOW_NBYTES = 32 << 20

_open_engines: weakref.WeakSet[OffloadEngine] = weakref.WeakSet()


class EngineClosed(RuntimeError):
    """The engine was used after `close()`."""


class EngineFailed(RuntimeError):
    """An update broke off midway; only the committed step in the store is whole."""


class OffloadEngine:
    """Wraps `module` and trains it with bounded device and host memory.

    Use it like the module: `loss = engine(x, y)`, `engine.backward(loss)` (or `loss.backward()`), `engine.step()`.

    The module's parameters keep shape and dtype; their values are there only while their unit computes. Reading one
    through its module fetches it; copying the module as a whole gives real values or is refused.

    Args:
        module: any `nn.Module`, on the CPU or on the compute device. Its parameters' memory is released.
        optimizer: an `AdamW`, `Adam` or `SGD` spec.
        config: budgets, tiers and dtype.

    Raises: ValueError for a configuration, model or optimizer that cannot work, with the mend; nothing is half-made.
    """

    def __init__(self, module: nn.Module, optimizer: OptimizerSpec, config: OffloadConfig | None = None) -> None:
        self.config = config if config is not None else OffloadConfig()
        self.module = module
        if isinstance(module, OffloadEngine) or any(isinstance(m.forward, UnitForward) for m in module.modules()):
            raise ValueError(
                "the module has been wrapped by an engine, and a module can be wrapped once; build a new one and load "
                "engine.state_dict() into it"
            )
        if not isinstance(optimizer, OptimizerSpec):
            name = optimizer.__name__ if isinstance(optimizer, type) else type(optimizer).__name__
            raise ValueError(
                f"optimizer is {name}; give a spec such as offload.AdamW(lr=...), which takes torch.optim's arguments "
                "without the parameters (AdamW, Adam, SGD)"
            )
        num_threads = torch.get_num_threads()
        torch.set_num_threads(num_threads)  # made explicit, so that threads started later compute with it too
        self._parts = parts = assemble(module, optimizer, self.config)
        bound_heap(parts.host_budget_nbytes)
        self._trace = parts.lanes.trace
        self.device = parts.device
        self._closed = False
        self._loop = LoopThread()
        stream = ChunkStream(parts.ring, parts.lanes)
        self._compute = ComputeRecord(self._trace)
        self._order = UseOrder(_first_order(parts.partition.call_sites))
        self._updates = PendingUpdates()
        self._residency = Residency(
            parts.layouts,
            parts.device,
            self._loop,
            parts.slots,
            self._order,
            Journeys(
                parts.layouts,
                parts.homes,
                parts.resting,
                parts.device,
                parts.lanes,
                parts.stage,
                stream,
                self._updates,
            ),
            self._updates,
            2 * max(parts.plan.ring_nbytes, MIN_UPDATE_WINDOW_NBYTES),
            self._trace,
        )
        room = self._residency.make_room if parts.device.one_memory else parts.stage.acquire
        self._gradients = Gradients(
            parts.layouts,
            parts.homes,
            parts.device,
            parts.lanes,
            self._loop,
            room,
            self.config.micro_batches,
            self._residency.settled,
        )
        self._stepper = Stepper(
            optimizer,
            parts.parameters,
            parts.layouts,
            self._gradients,
        )
        self._access = ParameterAccess(
            parts.layouts, parts.homes, stream, self._loop, parts.device.torch_device, self._residency.settled
        )
        self._bindings = Bindings(parts.parameters, parts.device.torch_device, self._read_private)
        self._runtime = CallRuntime(
            parts.device,
            self._residency,
            self._bindings,
            self._gradients,
            self._compute,
            self._check_open,
            num_threads,
            self.config.micro_batches,
            ActivationBudget(self.config.activation_budget_nbytes(parts.device)),
        )
        self._vertical = VerticalSchedule(
            self, self.backward, self._note_loss, module, parts.parameters, self._runtime, self.config.micro_batches
        )
        self._values = Values(
            module,
            parts.parameters,
            parts.layouts,
            self._access,
            self._gradients,
            self._stepper.counts,
            self._before_write,
            self._after_write,
        )
        self.optimizer = EngineOptimizer(self, optimizer, parts.groups)
        self._state = RunState(module, parts.parameters, parts.device, self._stepper.counts, self.optimizer)
        self._bound = self._open_bound()
        self._log = self._open_log()
        self._early = self._open_early()
        self._guards: Guards | None = None
        self._mid_step = False
        self._took_turns = False
        self._grad_scale = 1.0
        self._loss: Tensor | None = None
        self._tokens: int | None = 0
        self._step = 0
        self._since_s: float | None = None
        self._chrome: ChromeTrace | None = None
        dtypes = {info.parameter: info.parameter.dtype for info in parts.parameters}
        try:
            self._take_over()
        except BaseException:
            self._give_back(dtypes)
            self._loop.close()
            parts.close()
            raise
        _open_engines.add(self)

    def _open_log(self) -> CommitLog | None:
        """The log of commits, where there is a store that outlives the process."""
        store, every = self._parts.store, self.config.commit_interval
        if store is None or every is None:
            return None
        return CommitLog(store, self._parts.layouts, self._parts.homes, self._loop, every)

    def _open_bound(self) -> EngineBound | None:
        rig = self.config.read_rig()
        if rig is None:
            return None
        return EngineBound(
            rig,
            self._parts.layouts,
            self._parts.plan.homes,
            one_memory=self.device.one_memory,
            micro_batches=self.config.micro_batches,
            commit_interval=self.config.commit_interval,
            update=self.config.update,
            clips=self.config.clip_grad_norm is not None,
        )

    def _open_early(self) -> EarlyUpdates | None:
        """What begins updates in backward, where the configuration lets it."""
        mode = self.config.update
        if mode in ("next_forward", "step") or (mode == "auto" and self.config.commit_interval != 1):
            return None
        early = EarlyUpdates(
            self._stepper,
            self._residency,
            [layout.unit for layout in self._parts.layouts],
            lambda: self.optimizer.param_groups,
            self._loop,
            self._log,
            revocable=mode != "backward",
            only_if_usual=mode == "auto",
        )
        self._gradients.on_landing, self._gradients.on_complete = early.landing, early.complete
        return early

    def _take_over(self) -> None:
        """Move all values to their homes, then put placeholders, hooks and guards in place."""
        for layout in self._parts.layouts:
            if self._log is not None and self.config.resume:
                self._log.restore_resting(layout.unit.index)
            else:
                self._access.fill(layout)
            for member in layout.members:
                self._bindings.release(member.info.parameter)
        trim_heap()
        for part in self.module.modules():
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = buffer.to(self.device.torch_device)
        self._guards = Guards(
            self.module, self._parts.parameters, self._show, self._value_for_state_dict, self.drop_gradients
        )
        for site in self._parts.partition.call_sites:
            site.module.__dict__["forward"] = UnitForward(site, self._runtime)
        self._runtime.attach(self._parts.parameters)
        if self._log is not None and self.config.resume:
            self._step = self._state.restore(self._log.committed_state)
        elif self._log is not None:
            self._log.changed(dict.fromkeys(range(len(self._parts.layouts))))
            self._log.stage(0, self._state.capture(0), force=True)
            self._log.launch(self._state.capture_tracked)
            self._log.wait()

    def _give_back(self, dtypes: Mapping[nn.Parameter, torch.dtype]) -> None:
        """Construction failed: the module gets back what was taken from it, as far as the store can still be read."""
        if self._guards is not None:
            self._guards.remove()
        self._runtime.detach()
        for site in self._parts.partition.call_sites:
            site.module.__dict__.pop("forward", None)
        for layout in self._parts.layouts:
            taken = [p for p in layout.by_parameter if self._bindings.is_released(p)]
            if taken and not self.config.resume:
                for parameter, host in self._access.read(layout, taken, states=False).items():
                    self._bindings.restore(parameter, host.value.to(dtypes[parameter]))

    # -- training

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What `module(*args, **kwargs)` returns, computed with parameters streamed in and out."""
        self._enter()
        self._take_back_early()
        with_graph = torch.is_grad_enabled()
        self._order.begin("train" if with_graph else "eval")
        self._residency.ask_prefetch()
        if with_graph:
            self._count_tokens(args)
            if self._since_s is None:
                self._since_s = time.perf_counter()
        with self._runtime.forward_pass():
            result = self.module(*args, **kwargs)
        if not with_graph and not self._runtime.accumulating:
            self._forget_evaluation()
        return result

    def _forget_evaluation(self) -> None:
        """Evaluation belongs to no step: neither its time nor its record, which would grow for as long as it lasts."""
        self._since_s = None
        self._compute.forget()
        self._trace.forget_fetches()

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """`loss.backward(**kwargs)`; the loss is also noted for `StepInfo`. Nothing is scaled."""
        self._enter()
        loss.backward(**kwargs)
        self._note_loss(loss)

    def _note_loss(self, loss: Tensor) -> None:
        if loss.numel() == 1:
            value = loss.detach().reshape(())
            self._loss = value if self._loss is None else self._loss + value

    def train_step(
        self, batches: Sequence[Any], loss_fn: LossFn | None = None, reduction: Literal["mean", "sum"] = "mean"
    ) -> StepInfo:
        """Forward and backward of all micro-batches of a step, and `step()`.

        Each unit's parameters come to the device once in forward and once in backward, for all micro-batches.
        Where no random numbers are drawn, every bit is that of the plain loop: `engine(...)`, `engine.backward(loss)`
        per micro-batch, `engine.step()`. Micro-batch i draws its random numbers, in forward and in loss_fn, from
        generators seeded with s + i. s is drawn from the CPU's generator, as `torch.randint(2**62, ())`, when this is
        called, and that is all that the caller's generators show of it: numbers are the same for every placement.

        Where micro-batches cannot take turns they run one after another, with the same results, and a warning says so:
        where forward changes buffers or attributes of modules (batch norm), or where micro-batches call units in
        different orders. The inputs of all unit calls of all micro-batches are kept until backward.

        Args:
            batches: micro-batches, at most `micro_batches`; fewer make a shorter last step. A tensor is passed as
                `module(batch)`, a tuple or list as `module(*batch)`, a dict as `module(**batch)`.
            loss_fn: `loss_fn(result, batch)` returns the loss, a tensor of one element. Without it the module's result
                is the loss, or has it as `.loss` or `["loss"]`.
            reduction: "mean" divides each loss by the number of batches given, "sum" does not.

        Raises: ValueError, RuntimeError or TypeError for arguments that cannot work; what a forward raises, after which
            nothing is accumulated; otherwise as `step`.
        """
        self._enter()
        num, self._took_turns = self._vertical.run(batches, loss_fn, reduction)
        try:
            return self.step(partial=num < self.config.micro_batches)
        finally:
            self._took_turns = False

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> Tensor:
        """Clip the gradients accumulated so far, as `torch.nn.utils.clip_grad_norm_` does; returns the norm before.

        The factor is kept and applied inside the update. Raises: ValueError for another norm than 2; RuntimeError
        for a norm that is not finite, if asked for.
        """
        self._enter()
        if norm_type != 2.0:
            raise ValueError(f"norm_type={norm_type!r}; the engine clips by the 2-norm: give norm_type=2.0")
        norm = self._stepper.norm() * self._grad_scale
        if error_if_nonfinite and not math.isfinite(norm):
            raise RuntimeError(
                f"the global gradient norm is {norm}; drop the gradients with engine.optimizer.zero_grad()"
            )
        if not math.isnan(norm):
            self._grad_scale *= clip_factor(norm, max_norm)
        return torch.tensor(norm)

    def step(self, partial: bool = False) -> StepInfo:
        """Decide this step's update of all parameters that have a gradient.

        Blocks until all gradients are home and their norm is known. The update itself is made unit by unit before the
        unit's next use, with the hyperparameters of now, while earlier units already compute.
        A step whose loss or gradients are not finite is skipped: nothing changes, and `StepInfo.skipped` says so.
        With a durable store the step is committed behind the next step's compute; `flush()` waits for that.

        Args:
            partial: accept fewer backwards than `micro_batches` (a last, shorter accumulation).

        Raises: RuntimeError if backwards are missing or one failed midway; OffloadIOError from the store, also from an
            update of the step before.
        """
        self._enter()
        self._runtime.check_accumulation(partial)
        self._bindings.drop_private()
        loss = None if self._loss is None else float(self._loss)
        tokens = self._tokens
        wait_from_s = time.perf_counter()
        decision = self._stepper.decide(
            self._grad_scale, self.config.clip_grad_norm, loss, may_skip=self.config.update != "backward"
        )
        begun = self._early.decided(decision.grad_scale, decision.skipped) if self._early is not None else {}
        units = [layout.unit for layout in self._parts.layouts]
        self._residency.settle([u for u in units if u.index not in begun])  # what no forward has used since last step
        if not decision.skipped:
            self._launch_update(decision.grad_scale, begun)
        # Before anything that may be interrupted: these gradients have been used and must not be used again.
        self.drop_gradients()
        self._step += 1
        if self._log is not None:
            self._log.stage(self._step, self._state.capture(self._step))
        self._mid_step = False
        self.optimizer._opt_called = True  # type: ignore[attr-defined]  # lr schedulers ask whether a step came first
        if self.config.update == "step":
            self._residency.settle()
        now_s = time.perf_counter()
        self._trace.add_wait(Wait(wait_from_s, now_s, "step"))
        info = self._account(loss, tokens, decision, now_s)
        self._residency.ask_prefetch()
        return info

    def _launch_update(self, grad_scale: float, begun: Mapping[int, Future[None]]) -> None:
        """From here on every unit is used only after its update. `begun`: those that began in backward."""
        prepared = self._stepper.prepare(self.optimizer.param_groups, grad_scale, begun)
        self._mid_step = True
        made = self._residency.expect(prepared.updates, self._log.under_way if self._log is not None else None)
        self._stepper.book(prepared)
        self._values_changed()
        if self._log is not None:
            self._log.changed({**begun, **made})

    def drop_gradients(self) -> None:
        """Forget what was accumulated since the last step (`optimizer.zero_grad()`); also mends a failed backward."""
        if self._closed:
            return
        self._take_back_early()
        self._gradients.drop()
        for info in self._parts.parameters:
            info.parameter.grad = None
        self._grad_scale = 1.0
        self._loss = None
        self._tokens = 0
        self._runtime.forget()

    def train(self, mode: bool = True) -> OffloadEngine:
        self.module.train(mode)
        return self

    def eval(self) -> OffloadEngine:
        return self.train(False)

    # -- what survives

    @property
    def steps_done(self) -> int:
        """Steps that a crash now would not lose; without a durable store, steps made."""
        return self._log.steps_done if self._log is not None else self._step

    def track(self, *objects: Any) -> None:
        """Take objects with `state_dict` and `load_state_dict` (schedulers, data loaders) into every commit.

        Schedulers of `engine.optimizer` are captured when the engine is next entered after a step, because they step
        after the optimizer; everything else when `step()` returns, because a loader has moved on by the next entry.
        After a resume each gets its saved state at once, in the order in which they were tracked.
        """
        self._check_open()
        self._state.track(objects)

    def flush(self) -> None:
        """Commit the last step now, whatever the interval, and block until it is durable. Nothing without a store."""
        self._check_open()
        self._flush()

    def _flush(self) -> None:
        self._take_back_early()
        self._residency.settle()
        if self._log is None:
            return
        self._log.launch(self._state.capture_tracked)
        self._log.wait()
        if self._log.steps_done < self._step or self._log.has_changes:
            self._log.stage(self._step, self._state.capture(self._step), force=True)
            self._log.launch(self._state.capture_tracked)
            self._log.wait()

    # -- values

    def gather(
        self, *patterns: str, write: bool = False
    ) -> contextlib.AbstractContextManager[dict[str, HostParameter]]:
        """Bring real values of parameters to host memory, as fp32 masters, with states and gradients.

        Args:
            patterns: `fnmatch` patterns on parameter names, e.g. "blocks.0.*".
            write: whether values, states and gradients edited inside are written back at the end.

        Raises: KeyError if a pattern matches nothing. An exception inside leaves everything as it was.
        """
        self._check_open()
        self._take_back_early()
        return self._values.gather(patterns, write)

    def state_dict(self) -> dict[str, Tensor]:
        """The module's state dict in full precision (fp32 masters) in host memory, read unit by unit."""
        self._check_open()
        self._take_back_early()
        self._values_changed()
        try:
            return self._values.state_dict()
        finally:
            self._values_changed()

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True) -> None:
        """Set parameters and buffers from `state_dict`, unit by unit; optimizer states stay.

        Raises: KeyError for missing and unexpected names (if `strict`), ValueError for shapes that differ; nothing is
        written then.
        """
        self._check_open()
        self._values.load_state_dict(state_dict, strict)

    def read_states(self) -> dict[nn.Parameter, HostParameter]:
        """States of all trainable parameters in host memory."""
        self._check_open()
        self._take_back_early()
        return self._values.states()

    @property
    def memory(self) -> MemoryReport:
        """Bytes under the budgets, and what lies outside of them."""
        return memory_report(
            self._parts, self._runtime.ledger, self._runtime.activations, self._bindings.private_nbytes
        )

    def trace(self, path: str | os.PathLike[str] | None) -> None:
        """Write every step from here on to `path`, as a trace that Chrome, Perfetto and `offload timeline` draw.

        None ends the trace, and so does `close()`. Raises: OSError for a path that cannot be written.
        """
        self._check_open()
        before, self._chrome = self._chrome, None
        if before is not None:
            before.close()
        if path is not None:
            self._chrome = ChromeTrace(path)

    def __str__(self) -> str:
        return unit_table(self._parts)

    # -- the life of the engine

    def close(self) -> None:
        """Commit the last step, stop background work, give memory, threads and the store's lock back. Twice is safe.

        Values go with it: take `state_dict()` before. Afterwards parameters show NaN, and reading one raises.
        """
        if self._closed:
            return
        self._runtime.look_for_failed_backward()
        try:
            # An update without its number is no step, and one that broke off is none either.
            whole = not self._runtime.computing and not self._mid_step and self._updates.failure is None
            if whole and (self._early is None or self._early.can_take_back):
                self._flush()
        finally:
            self._closed = True
            _open_engines.discard(self)
            if self._chrome is not None:
                self._chrome.close()
            self._bindings.close()
            self._runtime.detach()
            if self._log is not None:
                self._log.settle()
            try:
                self._loop.close()
            finally:
                self._parts.close()

    def __enter__(self) -> OffloadEngine:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Close. A step whose schedulers may not have stepped, because an exception came between, is not committed."""
        if kind is not None and self._log is not None and self._state.has_schedulers:
            self._log.withdraw_staged()
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosed("the engine is closed; build a new OffloadEngine to go on")
        failure = self._updates.failure
        if failure is not None:
            first = self._updates.report()
            if first is not None:
                raise first
            raise EngineFailed(
                f"an update failed midway ({type(failure).__name__}: {failure}), so parameters and states "
                "are of two different steps; close the engine, mend the cause, and go on from the last committed step "
                "with OffloadConfig(resume=True)"
            ) from failure

    def _enter(self) -> None:
        """Every way in: the staged step is completed by what the user's loop did since, and committed."""
        self._check_open()
        self._runtime.look_for_failed_backward()
        if self._log is not None:
            self._log.launch(self._state.capture_tracked)

    def _take_back_early(self) -> None:
        """Before anybody looks at values of a step that is not decided: they are those of before."""
        last_backward_is_done = self._gradients.num_backwards >= self.config.micro_batches
        if self._early is not None and (self._early.has_begun or last_backward_is_done):
            with contextlib.suppress(Exception):  # a gradient that failed to land is raised by step()
                self._gradients.wait()
            self._early.take_back()

    def _before_write(self, unit: int) -> None:
        self._bindings.drop_private()
        self._take_back_early()
        self._residency.settle()
        if self._log is not None:
            self._log.launch(self._state.capture_tracked)
            self._log.wait()
        self._loop.run(self._residency.withdraw([self._parts.layouts[unit].unit]))

    def _after_write(self, unit: int) -> None:
        self._loop.call_soon(self._residency.admit, [self._parts.layouts[unit].unit])
        self._values_changed()
        if self._log is not None:
            self._log.changed({unit: None})

    def _values_changed(self) -> None:
        assert self._guards is not None
        self._guards.values_changed()

    def _read_private(self, parameter: nn.Parameter) -> Tensor:
        self._take_back_early()
        return self._access.read_compute(parameter)

    def _show(self, parameter: nn.Parameter) -> nn.Parameter:
        return self._runtime.leaf(self._bindings.show(parameter, outside_of_forward=not self._runtime.computing))

    def _value_for_state_dict(self, parameter: nn.Parameter) -> Tensor:
        self._check_open()
        self._take_back_early()
        return self._values.for_state_dict(parameter)

    def _count_tokens(self, args: tuple[Any, ...]) -> None:
        first = args[0] if args else None
        if self._tokens is not None and isinstance(first, Tensor) and not first.dtype.is_floating_point:
            self._tokens += first.numel()
        else:
            self._tokens = None

    def _account(self, loss: float | None, tokens: int | None, decision: Decision, now_s: float) -> StepInfo:
        self._compute.settle()
        spans, waits = self._trace.drain()
        since_s = self._since_s if self._since_s is not None else now_s
        seconds = now_s - since_s
        self._since_s = now_s
        bound_s = None if self._bound is None else self._bound.of(spans, self._took_turns).bound_s
        if self._chrome is not None:
            self._chrome.add(
                TracedStep(step=self._step, start_s=since_s, end_s=now_s, spans=spans, waits=waits, bound_s=bound_s)
            )
        return StepInfo(
            step=self._step,
            loss=loss,
            grad_norm=decision.grad_norm,
            lr=float(self.optimizer.param_groups[0]["lr"]),
            skipped=decision.skipped,
            seconds=seconds,
            tokens=tokens,
            nbytes=moved_nbytes(spans),
            busy_s=busy_s(spans),
            exposed_s=exposed_s(spans, waits),
            bound_s=bound_s,
        )


def _first_order(sites: tuple[CallSite, ...]) -> dict[str, list[int]]:
    """Before the first pass: order of registration, and back."""
    forward = [unit.index for site in sites for unit in site.units]
    return {"train": forward + forward[::-1], "eval": forward}


def _close_all() -> None:
    """Commit the last step of engines that nobody closed, and let their threads end with the interpreter."""
    with contextlib.ExitStack() as every_one:  # one that fails to close does not keep the others from committing
        for engine in list(_open_engines):
            every_one.callback(engine.close)


# Executors refuse work once `threading` has shut them down, and atexit comes after that; the last commit needs them.
getattr(threading, "_register_atexit", atexit.register)(_close_all)
