"""`OffloadEngine`: trains a module whose parameters, gradients and states live wherever there is room."""

from __future__ import annotations

import atexit
import contextlib
import logging
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .assembly import assemble
from .checkpoint import Resumed
from .config import OffloadConfig
from .engine_values import EngineValues
from .hostheap import bound_heap
from .info import MemoryReport, StepInfo
from .optimizers import OptimizerSpec
from .report import memory_report, unit_table
from .step import clip_factor
from .takeover import is_taken_over
from .untraced import untraced
from .vertical import LossFn
from .weights.adoption import first_values
from .weights.meta import initialised_values
from .weights.pretrained import open_pretrained
from .weights.source import ValueSource
from .wiring import wire

log = logging.getLogger("offload")

_open_engines: weakref.WeakSet[OffloadEngine] = weakref.WeakSet()


class EngineClosed(RuntimeError):
    """The engine was used after `close()`."""


class EngineFailed(RuntimeError):
    """An update broke off midway; only the committed step in the store is whole."""


class OffloadEngine(EngineValues):
    """Wraps `module` and trains it with bounded device and host memory.

    Use it like the module: `loss = engine(x, y)`, `engine.backward(loss)` (or `loss.backward()`), `engine.step()`.

    The module's parameters keep shape and dtype; their values are there only while their unit computes. Reading one
    through its module fetches it; copying the module as a whole gives real values or is refused.

    Args:
        module: any `nn.Module`, on the CPU or on the compute device, or built inside `offload.deferred_init()`. Its
            parameters' memory is released.
        optimizer: an `AdamW`, `Adam` or `SGD` spec, or a `TorchOptimizer` around another class.
        config: budgets, tiers and dtype.
        source: where first values come from; None: from the module, or from how it was to be initialised.

    Raises: ValueError for a configuration, model or optimizer that cannot work, with the mend; nothing is half-made.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: OptimizerSpec,
        config: OffloadConfig | None = None,
        *,
        source: ValueSource | None = None,
    ) -> None:
        self.config = config if config is not None else OffloadConfig()
        self.module = module
        if isinstance(module, OffloadEngine) or is_taken_over(module):
            raise ValueError(
                "the module, or a parameter of it, has been wrapped by an engine, and that can be done once; build a "
                "new one and load engine.state_dict() into it"
            )
        if not isinstance(optimizer, OptimizerSpec):
            name = optimizer.__name__ if isinstance(optimizer, type) else type(optimizer).__name__
            raise ValueError(
                f"optimizer is {name}; give a spec such as offload.AdamW(lr=...), which takes torch.optim's arguments "
                "without the parameters (AdamW, Adam, SGD); for other classes give "
                f"offload.TorchOptimizer(torch.optim.{name}, lr=...)"
            )
        torch.set_num_threads(torch.get_num_threads())  # explicit, so that threads started later compute with it too
        with first_values(module, source) as values:
            self._begin(optimizer, values)
        _open_engines.add(self)

    def _begin(self, optimizer: OptimizerSpec, values: ValueSource) -> None:
        self._parts = parts = assemble(self.module, optimizer, self.config)
        self.device = parts.device
        self._closed = False
        self._mid_step = False
        self._grad_scale = 1.0
        self._step = 0
        try:
            bound_heap(parts.host_budget_nbytes)
            self._wire(optimizer)
        except BaseException:
            parts.close()
            raise
        try:
            self._takeover.begin(
                values, self._show, self._value_for_state_dict, self.drop_gradients, self._forward_pass
            )
            self._begin_commits()
        except BaseException:
            self._takeover.undo(values)
            self._loop.close()
            parts.close()
            raise

    @classmethod
    def from_meta(
        cls,
        module: nn.Module,
        optimizer: OptimizerSpec,
        config: OffloadConfig | None = None,
        init: Callable[[nn.Module], object] | None = None,
    ) -> OffloadEngine:
        """Wrap a module that was built on the meta device: no more than one unit's values ever take memory beside the
        budget.

        Modules are initialised children first: a Hugging Face model by its `init_weights()`, others by their own
        `reset_parameters()`, or all by `init(module)`. Under the same seed that gives what an eager build gives,
        where its modules make their parameters last and initialise nothing of their children, as torch's own do.

        Raises: ValueError naming a parameter or buffer that this leaves without values; otherwise as the constructor.
        """
        return cls(module, optimizer, config, source=initialised_values(module, init))

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        optimizer: OptimizerSpec,
        config: OffloadConfig | None = None,
        *,
        module: nn.Module | None = None,
        strict: bool = True,
    ) -> OffloadEngine:
        """Wrap a module whose values come from safetensors files, read part by part, one unit at a time.

        Masters are the files' values exactly, whatever float dtype they have. The engine's `module` is in train mode.

        Args:
            path: a folder in Hugging Face's layout, its index file, or one .safetensors file.
            module: what to fill, best built inside `offload.deferred_init(seeded=False)`, or on the meta device. None:
                the Hugging Face class that the folder's config.json names, which needs transformers.
            strict: refuse missing and unexpected names. Without, what is missing is initialised by the module itself,
                what is unexpected is left out, and a warning lists both.

        Raises: ValueError for files that do not fit, listing names; ImportError without transformers; OSError;
            otherwise as the constructor.
        """
        module, source = open_pretrained(Path(path), module, strict)
        return cls(module, optimizer, config, source=source)

    def _wire(self, optimizer: OptimizerSpec) -> None:
        wired = wire(
            self._parts,
            self.module,
            optimizer,
            self,
            check_open=self._check_open,
            read_private=self._read_private,
            before_write=self._before_write,
            after_write=self._after_write,
        )
        self._loop = wired.loop
        self._order = wired.order
        self._updates = wired.updates
        self._residency = wired.residency
        self._gradients = wired.gradients
        self._stepper = wired.stepper
        self._scaling = wired.scaling
        self._access = wired.access
        self._bindings = wired.bindings
        self._runtime = wired.runtime
        self._vertical = wired.vertical
        self._values = wired.values
        self._average = wired.average
        self.optimizer = wired.optimizer
        self._state = wired.state
        self._log = wired.log
        self._checkpoints = wired.checkpoints
        self._early = wired.early
        self._record = wired.record
        self._takeover = wired.takeover

    def _begin_commits(self) -> None:
        """Go on from the committed step, or commit the values that the module came with as step 0; blocks."""
        if self._log is None:
            return
        if self.config.resume:
            self._step = self._state.restore(self._log.committed_state)
            return
        self._log.changed(dict.fromkeys(range(len(self._parts.layouts))))
        self._commit_now()

    # -- training

    @untraced
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What `module(*args, **kwargs)` returns, computed with parameters streamed in and out.

        Calling the module itself, or a part of it (`module.generate(...)`), does the same.
        """
        with self._forward_pass(args):
            return self.module(*args, **kwargs)

    @contextlib.contextmanager
    def _forward_pass(self, args: tuple[Any, ...]) -> Iterator[None]:
        self._enter()
        self._take_back_early()
        with_graph = torch.is_grad_enabled()
        self._order.begin("train" if with_graph else "eval")
        self._residency.ask_prefetch()
        if with_graph:
            self._record.forward_begins(args)
        with self._runtime.forward_pass():
            yield
        if not with_graph and not self._runtime.accumulating:
            self._record.forget_evaluation()

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """`loss.backward(**kwargs)`, scaled by `loss_scale` if there is one; the loss is noted for `StepInfo`.

        Raises: ValueError for `inputs=` beside a `loss_scale`, which would stay in their gradients.
        """
        self._enter()
        if kwargs.get("inputs") is not None and self._scaling.scale is not None:
            raise ValueError(
                f"engine.backward(inputs=...) with loss_scale={self.config.loss_scale!r} would leave the scale in the "
                "gradients of the inputs; call torch.autograd.grad(loss, inputs)"
            )
        self._average.check_hidden("backward()")
        self._scaling.scaled(loss).backward(**kwargs)
        self._record.note_loss(loss)

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
        where forward changes buffers or attributes of modules (batch norm), or which tensors their lists and dicts
        hold, or where micro-batches call units in different orders. What a forward leaves elsewhere (in globals, in
        objects that modules have, in what hooks collect) is not seen, and may not go from one call of a unit to
        another. The inputs of all unit calls of all micro-batches are kept until backward.

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
        self._average.check_hidden("train_step()")
        num, self._record.took_turns = self._vertical.run(batches, loss_fn, reduction)
        try:
            return self.step(partial=num < self.config.micro_batches)
        finally:
            self._record.took_turns = False

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> Tensor:
        """Clip the gradients accumulated so far, as `torch.nn.utils.clip_grad_norm_` does; returns the norm before.

        The factor is kept and applied inside the update. Raises: ValueError for another norm than 2; RuntimeError
        for a norm that is not finite, if asked for.
        """
        self._enter()
        if norm_type != 2.0:
            raise ValueError(f"norm_type={norm_type!r}; the engine clips by the 2-norm: give norm_type=2.0")
        norm = self._stepper.norm() * self._scaling.inverse * self._grad_scale
        if error_if_nonfinite and not math.isfinite(norm):
            raise RuntimeError(
                f"the global gradient norm is {norm}; drop the gradients with engine.optimizer.zero_grad()"
            )
        if not math.isnan(norm):
            self._grad_scale *= clip_factor(norm, max_norm)
        if self._grad_scale != 1.0:
            self._runtime.refuse_backward = (
                "a backward after engine.clip_grad_norm_(...), whose factor would fall on its gradients too; clip "
                "after the last backward of the step"
            )
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
        self._average.check_hidden("step()")
        self._runtime.check_accumulation(partial)
        self._scaling.check(self._gradients.num_backwards)
        self._bindings.drop_private()
        loss, tokens = self._record.loss(), self._record.tokens
        wait_from_s = time.perf_counter()
        decision = self._stepper.decide(
            self._grad_scale,
            self.config.clip_grad_norm,
            loss,
            may_skip=self.config.update != "backward",
            unscale=self._scaling.inverse,
        )
        begun = self._early.decided(decision.grad_scale, decision.skipped) if self._early is not None else {}
        units = [layout.unit for layout in self._parts.layouts]
        self._residency.settle([u for u in units if u.index not in begun])  # what no forward has used since last step
        in_step = self.config.update == "step"
        until_s = math.inf if in_step else time.perf_counter()  # what the update moves later is the next step's
        if not decision.skipped:
            self._launch_update(decision.grad_scale, begun)
        self._scaling.end_step(decision.grad_norm)
        # Before anything that may be interrupted: these gradients have been used and must not be used again.
        self.drop_gradients()
        self._step += 1
        if self._log is not None:
            self._log.stage(self._step, self._state.capture(self._step))
        self._mid_step = False
        self.optimizer._opt_called = True  # type: ignore[attr-defined]  # lr schedulers ask whether a step came first
        if in_step:
            self._residency.settle()
        lr = float(self.optimizer.param_groups[0]["lr"])
        info = self._record.end_step(self._step, loss, tokens, decision, lr, wait_from_s, until_s)
        self._residency.ask_prefetch()
        return info

    def _launch_update(self, grad_scale: float, begun: Mapping[int, Future[None]]) -> None:
        """From here on every unit is used only after its update. `begun`: those that began in backward."""
        prepared = self._stepper.prepare(self.optimizer.param_groups, grad_scale, begun)
        self._mid_step = True
        made = self._residency.expect(prepared.updates, self._log.under_way if self._log is not None else None)
        changed = [index for index, update in prepared.updates.items() if update.changes_parameters]
        self._stepper.book(prepared)
        if self._early is not None:
            self._early.keep()
        self._runtime.updates_launched([*begun, *changed])
        self._takeover.values_changed()
        if self._log is not None:
            self._log.changed({**begun, **made})

    @property
    def loss_scale(self) -> float | None:
        """The scale of the next loss, or None without one."""
        return self._scaling.scale

    def drop_gradients(self) -> None:
        """Forget what was accumulated since the last step (`optimizer.zero_grad()`); also mends a failed backward."""
        if self._closed:
            return
        self._runtime.end_passes()
        self._runtime.look_for_failed_backward()
        if self._runtime.broken:
            with contextlib.suppress(Exception):  # what still lands may begin an update; what fails to land is dropped
                self._gradients.wait()
        if self._runtime.broken and self._early is not None and not self._early.can_take_back:
            self._keep_early()
        else:
            self._take_back_early()
        self._gradients.drop()
        for info in self._parts.parameters:
            info.parameter.grad = None
        self._grad_scale = 1.0
        self._scaling.forget()
        self._record.forget_accumulation()
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
        """Block until all that is under way is on the drive: a save in the background, and, with a durable store, the
        last step, which is committed now, whatever the interval. Raises: CheckpointFailed if that save broke off."""
        self._check_open()
        self._average.check_hidden("flush()")
        self._flush()
        self._checkpoints.wait()

    def _flush(self) -> None:
        self._take_back_early()
        self._residency.settle()
        if self._log is None:
            return
        self._log.launch(self._state.capture_tracked)
        self._log.wait()
        if self._log.steps_done < self._step or self._log.has_changes:
            self._commit_now()

    def _commit_now(self) -> None:
        assert self._log is not None
        self._log.stage(self._step, self._state.capture(self._step), force=True)
        self._log.launch(self._state.capture_tracked)
        self._log.wait()

    # -- checkpoints

    def save(
        self,
        directory: str | os.PathLike[str],
        *,
        data: Any = None,
        keep: int | None = None,
        background: bool = False,
        frozen: bool = True,
    ) -> Path:
        """Write the last finished step, whole, to `directory/step-NNNNNN`; returns that path.

        Tracked objects and hyperparameters as they are now: call it after the schedulers have stepped. The folder
        appears whole or not at all, can be copied and moved, and replaces one of the same step.

        Args:
            data: where the loop is in its data, or anything else of numbers, strings, lists, dicts and tensors.
            keep: how many checkpoints stay in `directory`; the oldest go once the new one is on the drive.
            background: return at once. Units are copied behind training; an update waits until its unit is. A save
                that fails is raised by the next forward, step, save, `flush` or `close`; the last three wait for it.
            frozen: False leaves out frozen parameters, whose checksums are compared with the model's at `resume`.

        Raises: RuntimeError in the middle of a step; CheckpointError, OSError; CheckpointFailed for the save before, or
            if this one is there and whole, but older ones could not be removed.
        """
        self._check_between_steps("save")
        return self._checkpoints.save(
            Path(directory), self._step, data=data, keep=keep, background=background, frozen=frozen
        )

    def resume(self, directory: str | os.PathLike[str]) -> Resumed:
        """Go on from a checkpoint, or from the one that was saved last into a run's folder; returns what it was.

        Every byte is compared with its checksum, and the checkpoint with this model and optimizer, before anything
        changes. Hyperparameters become the saved ones. Objects that are tracked get their states now, others when they
        are tracked. A durable store commits the resumed step.

        Raises: CheckpointMissing, CheckpointDamaged, CheckpointMismatch, naming what is wrong, with nothing changed;
            OSError from the store, after which the engine is of no more use.
        """
        self._check_between_steps("resume", drop=True)
        loading = self._checkpoints.open(Path(directory), self._step if self._log is not None else 0)
        self.drop_gradients()
        resumed = self._checkpoints.load(loading, self._before_write, self._after_write)
        self._step = resumed.step
        if self._log is not None:
            self._commit_now()
        return resumed

    def _check_between_steps(self, what: str, drop: bool = False) -> None:
        self._check_open()
        self._average.check_hidden(f"{what}()")
        self._bindings.look_for_edits()
        self._runtime.look_for_failed_backward()
        if self._runtime.computing or (self._runtime.accumulating and not drop):
            raise RuntimeError(
                f"{what}() in the middle of a step: gradients belong to no checkpoint. Call it after step(), or drop "
                "them first with engine.optimizer.zero_grad()"
            )

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
        self._record.write_to(path)

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
            if self._updates.failure is None:
                self._average.hide()
            if whole and (self._early is None or self._early.can_take_back):
                self._flush()
        finally:
            self._closed = True
            _open_engines.discard(self)
            self._record.write_to(None)
            self._bindings.close()
            self._runtime.detach()
            if self._log is not None:
                self._log.settle()
            self._checkpoints.settle()
            try:
                self._loop.close()
            finally:
                self._parts.close()
        self._checkpoints.raise_failure()

    def __enter__(self) -> OffloadEngine:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Close. A step whose schedulers may not have stepped, because an exception came between, is not committed."""
        if kind is not None and self._log is not None and self._state.has_schedulers:
            self._log.withdraw_staged()
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosed("the engine is closed; build a new model and a new OffloadEngine around it to go on")
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
        self._checkpoints.raise_failure()
        self._runtime.end_calls()
        self._runtime.look_for_failed_backward()
        if self._log is not None:
            self._log.launch(self._state.capture_tracked)

    def _take_back_early(self) -> None:
        """Before anybody looks at values of a step that is not decided: they are those of before."""
        if self._early is not None and (self._early.has_begun or self._gradients.last_in_flight):
            with contextlib.suppress(Exception):  # a gradient that failed to land is raised by step()
                self._gradients.wait()
            self._early.take_back()

    def _keep_early(self) -> None:
        """A backward with update="backward" has raised: what it has updated stays so, as with a torch optimizer that
        steps in hooks."""
        assert self._early is not None
        made, parameters = self._early.keep_begun()
        for parameter in parameters:
            self._stepper.counts[parameter] += 1
        self._runtime.updates_launched(list(made))
        self._takeover.values_changed()
        if self._log is not None:
            self._log.changed(made)
        if made:
            names = ", ".join(repr(self._parts.layouts[index].unit.name) for index in sorted(made))
            log.warning('a backward with update="backward" has raised; units %s keep their update of it', names)


def _close_all() -> None:
    """Commit the last step of engines that nobody closed, and let their threads end with the interpreter."""
    with contextlib.ExitStack() as every_one:  # one that fails to close does not keep the others from committing
        for engine in list(_open_engines):
            every_one.callback(engine.close)


# Executors refuse work once `threading` has shut them down, and atexit comes after that; the last commit needs them.
getattr(threading, "_register_atexit", atexit.register)(_close_all)
