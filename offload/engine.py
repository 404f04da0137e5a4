"""`OffloadEngine`: trains a module whose parameters, gradients and states live wherever there is room."""

from __future__ import annotations

import atexit
import contextlib
import fnmatch
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .access import HostParameter, ParameterAccess
from .assembly import assemble
from .bindings import Bindings
from .calls import UnitForward
from .config import OffloadConfig
from .engine_optimizer import EngineOptimizer
from .gradients import Gradients
from .guards import GradientInEngine, Guards
from .homes import ChunkStream
from .hostheap import bound_heap, trim_heap
from .info import MemoryReport, StepInfo
from .optimizers import OptimizerSpec
from .order import UseOrder
from .report import unit_table
from .residency import Residency, Staged
from .scheduler.loop import LoopThread
from .scheduler.trace import Wait, busy_s, exposed_s, moved_nbytes
from .step import Stepper, clip_factor
from .units import CallSite
from .usage import CallLedger, ComputeRecord

_open_engines: weakref.WeakSet[OffloadEngine] = weakref.WeakSet()


class EngineClosed(RuntimeError):
    """The engine was used after `close()`."""


class OffloadEngine:
    """Wraps `module` and trains it with bounded device and host memory.

    Use it like the module: `loss = engine(x, y)`, `engine.backward(loss)` (or `loss.backward()`), `engine.step()`.

    The module's parameters keep shape and dtype; their values are there only while their unit computes. Reading one
    through its module fetches it; copying the module as a whole gives real values or is refused.

    Invariant: compute runs with the number of threads that torch had when the engine was built, because kernels
    round differently with another number.

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
                "the module is already wrapped by an engine; close that engine first, or build a new module"
            )
        self._spec = optimizer
        self._num_threads = torch.get_num_threads()
        torch.set_num_threads(self._num_threads)  # made explicit, so that threads started later compute with it too
        bound_heap(self.config.host_budget_nbytes())
        parts = assemble(module, optimizer, self.config)
        groups = optimizer.make_groups(parts.parameters)
        self._parts = parts
        self._trace = parts.lanes.trace
        self.device = parts.device
        self._closed = False
        self._thread = threading.local()
        self._loop = LoopThread()
        self._stream = ChunkStream(parts.ring, parts.lanes)
        self._ledger = CallLedger()
        self._compute = ComputeRecord(self._trace)
        self._infos = {info.parameter: info for info in parts.parameters}
        self._order = UseOrder(_first_order(parts.partition.call_sites))
        self._residency = Residency(
            parts.layouts,
            parts.homes,
            parts.resting,
            parts.device,
            parts.lanes,
            self._loop,
            parts.slots,
            parts.stage,
            self._order,
        )
        room = self._residency.make_room if parts.device.one_memory else parts.stage.acquire
        self._gradients = Gradients(
            parts.layouts, parts.homes, parts.device, parts.lanes, self._loop, room, self.config.micro_batches
        )
        self._stepper = Stepper(
            optimizer,
            parts.parameters,
            parts.layouts,
            parts.homes,
            self._gradients,
            self._residency,
            self._stream,
            self._loop,
        )
        self._access = ParameterAccess(parts.layouts, parts.homes, self._stream, self._loop, parts.device.torch_device)
        self._bindings = Bindings(parts.parameters, parts.device.torch_device, self._access.read_compute)
        self._full_values: dict[nn.Parameter, Tensor] | None = None
        self._hooks: list[Any] = []
        self._in_forward = 0
        self._in_backward = False
        self._broken: str | None = None
        self._grad_scale = 1.0
        self._loss: Tensor | None = None
        self._tokens: int | None = 0
        self._step = 0
        self._since_s: float | None = None
        try:
            self._take_over()
        except BaseException:
            self._loop.close()
            parts.close()
            raise
        self.optimizer = EngineOptimizer(self, optimizer, groups)
        self.optimizer.seal()
        _open_engines.add(self)

    def _take_over(self) -> None:
        """Move all values to their homes, then put placeholders, hooks and guards in place."""
        for layout in self._parts.layouts:
            self._access.fill(layout)
            for member in layout.members:
                self._bindings.release(member.info.parameter)
        trim_heap()
        self._guards = Guards(
            self.module, self._parts.parameters, self._show, self._state_dict_value, self.drop_gradients
        )
        for site in self._parts.partition.call_sites:
            site.module.__dict__["forward"] = UnitForward(site, self)
        for info in self._parts.parameters:
            if info.trainable:
                self._hooks.append(info.parameter.register_hook(_GradientClearer(info.parameter)))
                self._hooks.append(info.parameter.register_post_accumulate_grad_hook(self._take_gradient))
        for buffer_owner in self.module.modules():
            for name, buffer in buffer_owner._buffers.items():
                if buffer is not None:
                    buffer_owner._buffers[name] = buffer.to(self.device.torch_device)

    # -- training

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What `module(*args, **kwargs)` returns, computed with parameters streamed in and out."""
        self._check_open()
        self._look_for_failed_backward()
        if self._since_s is None:
            self._since_s = time.perf_counter()
        with_graph = torch.is_grad_enabled()
        self._order.begin("train" if with_graph else "eval")
        self._residency.ask_prefetch()
        if with_graph:
            self._count_tokens(args)
        self._in_forward += 1
        try:
            return self.module(*args, **kwargs)
        finally:
            self._in_forward -= 1
            if not with_graph and not self._gradients.num_backwards and not self._in_backward:
                self._bindings.drop_private()

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """`loss.backward(**kwargs)`; the loss is also noted for `StepInfo`. Nothing is scaled."""
        self._check_open()
        self._look_for_failed_backward()
        loss.backward(**kwargs)
        if loss.numel() == 1:
            value = loss.detach().reshape(())
            self._loss = value if self._loss is None else self._loss + value

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> Tensor:
        """Clip the gradients accumulated so far, as `torch.nn.utils.clip_grad_norm_` does; returns the norm before.

        The factor is kept and applied inside the update. Raises: ValueError for another norm than 2; RuntimeError
        for a norm that is not finite, if asked for.
        """
        self._check_open()
        if norm_type != 2.0:
            raise ValueError(f"norm_type={norm_type!r}; the engine clips by the 2-norm: give norm_type=2.0")
        norm = self._stepper.norm() * self._grad_scale
        if error_if_nonfinite and not torch.isfinite(torch.tensor(norm)):
            raise RuntimeError(
                f"the global gradient norm is {norm}; drop the gradients with engine.optimizer.zero_grad()"
            )
        if norm == norm:
            self._grad_scale *= clip_factor(norm, max_norm)
        return torch.tensor(norm)

    def step(self, partial: bool = False) -> StepInfo:
        """Update all parameters that have a gradient; blocks until the update is written.

        A step whose loss or gradients are not finite is skipped: nothing changes, and `StepInfo.skipped` says so.

        Args:
            partial: accept fewer backwards than `micro_batches` (a last, shorter accumulation).

        Raises: RuntimeError if backwards are missing or one failed midway; OffloadIOError from the store.
        """
        self._check_open()
        self._look_for_failed_backward()
        self._check_accumulation(partial)
        self._bindings.drop_private()
        loss = None if self._loss is None else float(self._loss)
        wait_from_s = time.perf_counter()
        decision = self._stepper.decide(self._grad_scale, self.config.clip_grad_norm, loss)
        if not decision.skipped:
            self._stepper.update(self.optimizer.param_groups, decision.grad_scale)
            self._guards.values_changed()
        self.optimizer._opt_called = True  # type: ignore[attr-defined]  # lr schedulers ask whether a step came before theirs
        now_s = time.perf_counter()
        self._trace.add_wait(Wait(wait_from_s, now_s, "step"))
        self._step += 1
        info = self._account(loss, decision.grad_norm, decision.skipped, now_s)
        self.drop_gradients()
        self._residency.ask_prefetch()
        return info

    def drop_gradients(self) -> None:
        """Forget what was accumulated since the last step (`optimizer.zero_grad()`); also mends a failed backward."""
        if self._closed:
            return
        self._gradients.drop()
        self._bindings.drop_private()
        for parameter in self._infos:
            parameter.grad = None
        self._grad_scale = 1.0
        self._loss = None
        self._tokens = 0
        self._in_backward = False
        self._broken = None

    def train(self, mode: bool = True) -> OffloadEngine:
        self.module.train(mode)
        return self

    def eval(self) -> OffloadEngine:
        return self.train(False)

    # -- values

    @contextlib.contextmanager
    def gather(self, *patterns: str, write: bool = False) -> Iterator[dict[str, HostParameter]]:
        """Bring real values of parameters to host memory, as fp32 masters, with states and gradients.

        Args:
            patterns: `fnmatch` patterns on parameter names, e.g. "blocks.0.*".
            write: whether values, states and gradients edited inside are written back at the end.

        Raises: KeyError if a pattern matches nothing. An exception inside leaves everything as it was.
        """
        self._check_open()
        self._gradients.wait()
        present = self._gradients.present()
        gathered: dict[str, HostParameter] = {}
        chosen: list[tuple[Any, dict[nn.Parameter, HostParameter]]] = []
        for pattern in patterns:
            if not any(fnmatch.fnmatchcase(name, pattern) for info in self._infos.values() for name in info.names):
                raise KeyError(
                    f"no parameter matches {pattern!r}; names look like {next(iter(self._infos.values())).name!r}"
                )
        for layout in self._parts.layouts:
            wanted = [
                p
                for p in layout.by_parameter
                if any(fnmatch.fnmatchcase(name, pattern) for name in self._infos[p].names for pattern in patterns)
            ]
            if wanted:
                values = self._access.read(layout, wanted, states=True, grads=present)
                for parameter, value in values.items():
                    value.step = self._stepper.counts.get(parameter, 0)
                    gathered.update(dict.fromkeys(self._infos[parameter].names, value))
                chosen.append((layout, values))
        yield gathered
        if write:
            self._write_back(chosen)

    def _write_back(self, chosen: list[tuple[Any, dict[nn.Parameter, HostParameter]]]) -> None:
        self._bindings.drop_private()
        for layout, values in chosen:
            self._loop.run(self._residency.evict([layout.unit]))
            self._access.write(layout, values)
            for parameter, value in values.items():
                if parameter in self._stepper.counts:
                    self._stepper.counts[parameter] = value.step
        self._gradients.forget_norms()
        self._guards.values_changed()

    def state_dict(self) -> dict[str, Tensor]:
        """The module's state dict in full precision (fp32 masters) in host memory, read unit by unit."""
        self._check_open()
        values: dict[nn.Parameter, Tensor] = {}
        for layout in self._parts.layouts:
            for parameter, host in self._access.read(layout, list(layout.by_parameter), states=False).items():
                values[parameter] = host.value
        self._full_values = values
        self._guards.values_changed()
        try:
            return dict(self.module.state_dict())
        finally:
            self._full_values = None
            self._guards.values_changed()

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True) -> None:
        """Set parameters and buffers from `state_dict`, unit by unit; optimizer states stay.

        Raises: KeyError for missing and unexpected names (if `strict`), ValueError for shapes that differ; nothing is
        written then.
        """
        self._check_open()
        buffers = dict(self.module.named_buffers())
        known = {name: info for info in self._infos.values() for name in info.names}
        persistent = set(self._names_in_state_dict())
        missing = sorted(persistent - set(state_dict))
        unexpected = sorted(set(state_dict) - persistent)
        if strict and (missing or unexpected):
            raise KeyError(f"state_dict does not fit: missing {missing[:5]}, unexpected {unexpected[:5]}")
        for name, value in state_dict.items():
            shape = known[name].shape if name in known else buffers[name].shape if name in buffers else value.shape
            if value.shape != shape:
                raise ValueError(
                    f"{name!r} has shape {tuple(value.shape)} in state_dict and {tuple(shape)} in the model"
                )
        for layout in self._parts.layouts:
            chosen = {
                p: next((state_dict[n] for n in self._infos[p].names if n in state_dict), None)
                for p in layout.by_parameter
            }
            values = self._access.read(layout, [p for p, v in chosen.items() if v is not None], states=True)
            for parameter, host in values.items():
                host.value.copy_(chosen[parameter])  # type: ignore[arg-type]
                host.step = self._stepper.counts.get(parameter, 0)
            if values:
                self._write_back([(layout, values)])
        for name in set(buffers) & set(state_dict):
            buffers[name].copy_(state_dict[name])

    def _names_in_state_dict(self) -> Iterator[str]:
        for prefix, part in self.module.named_modules(remove_duplicate=False):
            dot = f"{prefix}." if prefix else ""
            yield from (dot + name for name, p in dict.items(part._parameters) if p is not None)
            hidden = part._non_persistent_buffers_set
            yield from (dot + name for name, b in part._buffers.items() if b is not None and name not in hidden)

    @property
    def memory(self) -> MemoryReport:
        """Bytes under the budgets, and what lies outside of them."""
        parts = self._parts
        host = [pool.statistics() for pool in (parts.rest, parts.ring, parts.stage)]
        device = parts.slots.statistics()
        one_memory = parts.device.one_memory
        return MemoryReport(
            host_budget_nbytes=parts.host_budget_nbytes,
            host_used_nbytes=sum(one.leased_nbytes + one.warm_nbytes for one in host),
            host_peak_nbytes=sum(one.peak_nbytes for one in host),
            device_budget_nbytes=parts.plan.device_nbytes,
            device_used_nbytes=0 if one_memory else device.leased_nbytes + device.warm_nbytes,
            device_peak_nbytes=0 if one_memory else device.peak_nbytes,
            boundaries_peak_nbytes=self._ledger.boundaries_peak_nbytes,
            temporaries_nbytes=self._ledger.temporaries_nbytes,
            private_nbytes=self._bindings.private_nbytes,
        )

    def __str__(self) -> str:
        return unit_table(self._parts)

    # -- the life of the engine

    def close(self) -> None:
        """Stop background work and give memory, threads and the store's lock back. Safe to call twice.

        Values go with it: take `state_dict()` before. Afterwards parameters show NaN, and reading one raises.
        """
        if self._closed:
            return
        self._closed = True
        _open_engines.discard(self)
        self._bindings.close()
        for hook in self._hooks:
            hook.remove()
        try:
            self._loop.close()
        finally:
            self._parts.close()

    def __enter__(self) -> OffloadEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosed("the engine is closed; build a new OffloadEngine to go on")

    # -- what calls ask of their host (see calls.CallHost)

    @contextlib.contextmanager
    def hold(self, site: CallSite, recompute: bool = False) -> Iterator[None]:
        self._check_open()
        if torch.get_num_threads() != self._num_threads:
            torch.set_num_threads(self._num_threads)
        staged: list[Staged] = self._residency.acquire(site.units)
        try:
            self._bindings.bind(staged)
        except BaseException:
            self._residency.release(site.units)
            raise
        begin = self.device.record()
        self._thread.recomputing = self.recomputing + recompute
        try:
            yield
        finally:
            self._thread.recomputing -= recompute
            self._compute.add(site, begin, self.device.record())
            self._bindings.unbind(staged)
            self._residency.release(site.units)

    @property
    def recomputing(self) -> int:
        """How many backwards of units the calling thread is inside of."""
        return getattr(self._thread, "recomputing", 0)

    def forward_made(self, site: CallSite) -> None:
        self._ledger.made(site)

    def forward_dropped(self, site: CallSite) -> None:
        self._ledger.done(site)

    def boundary_held(self, nbytes: int) -> None:
        self._ledger.boundary_held(nbytes)

    def temporaries_seen(self, site: CallSite, nbytes: int) -> None:
        self._ledger.temporaries_seen(nbytes)

    def backward_begins(self, site: CallSite) -> None:
        self._check_open()
        self._backward_seen()
        for unit in site.units:
            for info in unit.parameters:
                info.parameter.grad = None

    def backward_ended(self, site: CallSite, first_visit: bool) -> None:
        if first_visit:
            self._ledger.done(site)
        for unit in site.units:
            private = any(self._bindings.is_private(info.parameter) for info in unit.parameters)
            self._gradients.flush(unit.index, private or not first_visit or self._ledger.pending(unit.index))

    def _backward_seen(self) -> None:
        """The first node of a backward: ask autograd to tell us when the last one is done."""
        if self._in_backward:
            return
        if self._gradients.num_backwards >= self.config.micro_batches:
            raise RuntimeError(
                f"backward number {self._gradients.num_backwards + 1} of a step with "
                f"micro_batches={self.config.micro_batches}; "
                "call engine.step() first, or set OffloadConfig(micro_batches=...) to the number of backwards per step"
            )
        self._in_backward = True
        torch.autograd.Variable._execution_engine.queue_callback(self._backward_done)

    def _backward_done(self) -> None:
        self._gradients.end_backward()
        self._in_backward = False
        with torch.no_grad():
            for parameter in self._gradients.present():
                parameter.grad = GradientInEngine(self._bindings.placeholder(parameter))

    def _take_gradient(self, parameter: nn.Parameter) -> None:
        self._backward_seen()
        self._gradients.take(parameter)

    def _look_for_failed_backward(self) -> None:
        """A backward that began and whose end was never told has raised midway: its gradients are not whole."""
        if self._in_backward and not self._in_forward:
            self._in_backward = False
            self._broken = "a backward raised midway"

    def _check_accumulation(self, partial: bool) -> None:
        done, wanted = self._gradients.num_backwards, self.config.micro_batches
        if self._broken:
            raise RuntimeError(
                f"{self._broken}, so this step's gradients are incomplete; drop them with "
                f"engine.optimizer.zero_grad() and go on"
            )
        if done == wanted or (partial and 0 < done < wanted):
            return
        raise RuntimeError(
            f"step() after {done} of {wanted} backwards (micro_batches={wanted}); "
            + (
                "call engine.backward(loss) first"
                if not done
                else "run the others, or step(partial=True) for a shorter last step"
            )
        )

    # -- what the optimizer and the guards ask

    def read_states(self) -> dict[nn.Parameter, HostParameter]:
        """States of all trainable parameters in host memory."""
        self._check_open()
        states: dict[nn.Parameter, HostParameter] = {}
        for layout in self._parts.layouts:
            trainable = [p for p in layout.by_parameter if p in self._stepper.counts]
            for parameter, host in self._access.read(layout, trainable, states=True).items():
                host.step = self._stepper.counts[parameter]
                states[parameter] = host
        return states

    def _show(self, parameter: nn.Parameter) -> nn.Parameter:
        return self._bindings.show(parameter, outside_of_forward=not self._in_forward and not self._in_backward)

    def _state_dict_value(self, parameter: nn.Parameter) -> Tensor:
        self._check_open()
        if self._full_values is not None:
            return self._full_values[parameter]
        return self._access.read_compute(parameter).cpu()

    def _count_tokens(self, args: tuple[Any, ...]) -> None:
        first = args[0] if args else None
        if self._tokens is not None and isinstance(first, Tensor) and not first.dtype.is_floating_point:
            self._tokens += first.numel()
        else:
            self._tokens = None

    def _account(self, loss: float | None, grad_norm: float, skipped: bool, now_s: float) -> StepInfo:
        self._compute.settle()
        spans, waits = self._trace.drain()
        seconds = now_s - (self._since_s if self._since_s is not None else now_s)
        self._since_s = now_s
        return StepInfo(
            step=self._step,
            loss=loss,
            grad_norm=grad_norm,
            lr=float(self.optimizer.param_groups[0]["lr"]) if self.optimizer.param_groups else 0.0,
            skipped=skipped,
            seconds=seconds,
            tokens=self._tokens,
            nbytes=moved_nbytes(spans),
            busy_s=busy_s(spans),
            exposed_s=exposed_s(spans, waits),
        )


class _GradientClearer:
    """Runs before autograd accumulates into a parameter: what `grad` shows between steps is no tensor to add to."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self._parameter = weakref.ref(parameter)

    def __call__(self, gradient: Tensor) -> None:
        parameter = self._parameter()
        if parameter is not None and isinstance(parameter.grad, GradientInEngine):
            parameter.grad = None


def _first_order(sites: tuple[CallSite, ...]) -> dict[str, list[int]]:
    """Before the first pass: order of registration, and back."""
    forward = [unit.index for site in sites for unit in site.units]
    return {"train": forward + forward[::-1], "eval": forward}


@atexit.register
def _close_all() -> None:
    """Threads of an engine that nobody closed would keep the interpreter from ending."""
    for engine in list(_open_engines):
        engine.close()
