"""What calls ask of the engine while a pass runs: hold units, count what backward owes, tell when it is done."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .activations import ActivationBudget
from .bindings import Bindings
from .gradients import Gradients
from .guards import GradientInEngine
from .hooks import GradientHooks
from .residency import Residency
from .scheduler.devices import Device
from .staged import Staged
from .turns import Stay, Turn
from .units import CallSite, ParameterInfo, Unit
from .usage import CallLedger, ComputeRecord

FIRST_TURN = Turn(0, None)
"""Of every call in a pass without turns, and of those that a recomputation makes in backward."""


class CallRuntime:
    """The host of all unit calls of one engine (see `calls.CallHost`), and the bookkeeper of backwards.

    A backward begins at the first call that autograd visits and ends when autograd has visited the last node. One
    that began and whose end was never told has raised midway; its gradients are not whole, and the step says so.

    Micro-batches may take turns (`vertical.py`): `turn` then says whose code runs. Their forwards are several, their
    backward is one.

    Args:
        check_open: raises if the engine is closed.
        num_threads: compute threads, fixed for the life of the engine: kernels round differently with another number.
        micro_batches: backwards per step.
        unscale: what a `GradScaler` does to gradients that live in the engine; see `GradientInEngine`.
    """

    def __init__(
        self,
        device: Device,
        residency: Residency,
        bindings: Bindings,
        gradients: Gradients,
        compute: ComputeRecord,
        check_open: Callable[[], None],
        num_threads: int,
        micro_batches: int,
        activations: ActivationBudget,
        unscale: Callable[[Tensor, Tensor], None],
    ) -> None:
        self.device = device
        self.activations = activations
        self.ledger = CallLedger()
        self._residency = residency
        self._bindings = bindings
        self._gradients = gradients
        self._compute = compute
        self._check_open = check_open
        self._num_threads = num_threads
        self._micro_batches = micro_batches
        self._unscale = unscale
        self._thread = threading.local()
        self._own_hooks: list[Any] = []
        self._passes: set[tuple[int, object]] = set()
        self._in_backward = False
        self._broken: str | None = None
        self._num_updates: Counter[int] = Counter()
        self._stay = Stay(residency)
        self._taking_turns = False
        self._leaves: dict[tuple[int, nn.Parameter], nn.Parameter] = {}
        self._visiting: list[Turn | None] = []
        self.turn: Turn | None = None
        self.pause: Callable[[CallSite], None] | None = None
        self.stashed: set[tuple[nn.Module, str]] = set()
        self.hooks = GradientHooks(micro_batches)
        self.refuse_backward: str | None = None
        gradients.on_sum = self._call_hooks

    def attach(self, parameters: Sequence[ParameterInfo]) -> None:
        """Take the gradients of these parameters as autograd accumulates them."""
        for info in parameters:
            if info.trainable:
                parameter, frozen = info.parameter, not info.parameter.requires_grad
                self.hooks.take_off(parameter)
                parameter.requires_grad_(True)  # torch hooks no other
                self._own_hooks.append(parameter.register_hook(_GradientClearer(parameter, self._backward_seen)))
                self._own_hooks.append(parameter.register_post_accumulate_grad_hook(self._take_gradient))
                parameter.requires_grad_(not frozen)
                self.hooks.shadow(parameter)

    def detach(self) -> None:
        for hook in self._own_hooks:
            hook.remove()
        self._own_hooks.clear()
        self.hooks.put_back()

    def _call_hooks(self, unit: Unit, gradients: dict[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
        """The user's hooks on one backward's gradients of `unit`; they may look at its parameters."""
        if not self.hooks.on(gradients):
            return gradients
        with self.hold(CallSite(unit.name, nn.Module(), (unit,))), torch.no_grad():
            return self.hooks.call(gradients)

    # -- passes

    @contextlib.contextmanager
    def forward_pass(self) -> Iterator[None]:
        """Around a call of the wrapped module. Without gradients to come, private copies end with it."""
        token = threading.get_ident(), object()
        try:
            self._passes.add(token)
            yield
        finally:
            self._passes.discard(token)
            if not self.accumulating and not self._passes and not torch.is_grad_enabled():
                self._bindings.drop_private(keep_for_graphs=True)

    @property
    def broken(self) -> bool:
        """Whether a backward of this step raised midway."""
        return self._broken is not None

    @property
    def in_forward(self) -> bool:
        """Whether a forward is under way."""
        return bool(self._passes)

    def end_calls(self) -> None:
        """This thread is inside of no call of a unit: undo what is left of one that an interrupt kept from ending."""
        while self._holds:
            self._bindings.unbind(self._holds[-1].staged, self._holds[-1])
            self._holds.pop()

    def end_passes(self) -> None:
        """This thread is inside of no forward: as `end_calls`."""
        self.end_calls()
        for token in [token for token in list(self._passes) if token[0] == threading.get_ident()]:
            self._passes.discard(token)

    @property
    def accumulating(self) -> bool:
        """Whether a step has begun: a backward is done or under way."""
        return self._gradients.num_backwards > 0 or self._in_backward

    @property
    def computing(self) -> bool:
        """Whether a forward or a backward is under way."""
        return self.in_forward or self._in_backward

    def look_for_failed_backward(self) -> None:
        if self._in_backward and not self.in_forward:
            self._in_backward = False
            self._broken = "a backward raised midway"

    def check_accumulation(self, partial: bool) -> None:
        """Raises: RuntimeError if the step's gradients are not whole, with what is missing."""
        done, wanted = self._gradients.num_backwards, self._micro_batches
        self.check_whole()
        self._refuse_set_gradients()
        if done == wanted or (partial and 0 < done < wanted):
            return
        mend = (
            "run the others, or step(partial=True) for a shorter last step"
            if done
            else "call engine.backward(loss) first"
        )
        raise RuntimeError(f"step() after {done} of {wanted} backwards (micro_batches={wanted}); {mend}")

    def check_whole(self) -> None:
        """Raises: RuntimeError if a backward of this step raised midway."""
        if self._broken:
            raise RuntimeError(
                f"{self._broken}, so this step's gradients are incomplete; drop them with "
                "engine.optimizer.zero_grad() and go on"
            )

    def forget(self) -> None:
        """The accumulation was dropped, and with it what had gone wrong."""
        self._in_backward = False
        self._broken = None
        self.refuse_backward = None

    # -- micro-batches that take turns

    @contextlib.contextmanager
    def taking_turns(self, num: int) -> Iterator[None]:
        """Inside, `num` micro-batches run their forwards in turns and their backwards as one."""
        self._gradients.begin_turns(num, self.ledger.pending)
        self._taking_turns = True
        try:
            yield
        finally:
            self._taking_turns = False
            self.turn, self.pause = None, None
            self._visiting = []
            self.stashed = set()
            self._leaves = {}
            self._stay.end()
            if not self.accumulating:  # no backward was made
                self._gradients.drop()

    def leaf(self, parameter: nn.Parameter) -> nn.Parameter:
        """What code outside of units computes with instead of `parameter`, which shows its values.

        Invariant: where micro-batches take turns, each has a leaf of its own. Autograd would add up what they
        contribute to one leaf before anybody sees it, in 16 bits and in an order of its own.
        """
        turn = self.turn
        if turn is None or self._depth or not parameter.requires_grad or not torch.is_grad_enabled():
            return parameter
        leaf = self._leaves.get((turn.micro_batch, parameter))
        if leaf is None:
            unit, micro_batch = self._gradients.unit_of(parameter), turn.micro_batch
            leaf = self._leaves[micro_batch, parameter] = nn.Parameter(parameter.data)

            def take(leaf: Tensor) -> None:
                self._backward_seen()
                self._gradients.take(parameter, micro_batch, leaf)
                self.ledger.owe(unit, micro_batch, -1)
                self._gradients.flush_turn(unit)

            leaf.register_post_accumulate_grad_hook(take)
            self.ledger.owe(unit, micro_batch, 1)
        return leaf

    # -- one call (see calls.CallHost)

    @property
    def _holds(self) -> list[_Hold]:
        """The calls of units that the calling thread is inside of."""
        holds: list[_Hold] | None = getattr(self._thread, "holds", None)
        if holds is None:
            holds = self._thread.holds = []
        return holds

    @property
    def recomputing(self) -> int:
        return sum(hold.recompute for hold in self._holds)

    @property
    def _depth(self) -> int:
        """How many calls of units the calling thread is inside of."""
        return len(self._holds)

    def before_call(self, site: CallSite) -> None:
        if self.pause is not None and not self._depth:
            self.pause(site)

    @contextlib.contextmanager
    def hold(self, site: CallSite, recompute: bool = False) -> Iterator[Sequence[Staged]]:
        self._check_open()
        if torch.get_num_threads() != self._num_threads:
            torch.set_num_threads(self._num_threads)
        with self._staged(site, recompute) as staged:
            hold = _Hold(staged, recompute)
            begin = self.device.record()
            try:
                # Invariant: on the list before it is bound and until it is not. An interrupt at any line between leaves
                # an entry there, by which `mend` undoes the rest; values of a slot that others fill would show on.
                self._holds.append(hold)
                self._bindings.bind(staged, hold)
                yield staged
            finally:
                self._compute.add(site, "backward" if recompute else "forward", begin, self.device.record())
                self._bindings.unbind(staged, hold)
                if hold in self._holds:
                    self._holds.remove(hold)

    @contextlib.contextmanager
    def _staged(self, site: CallSite, recompute: bool) -> Iterator[Sequence[Staged]]:
        """The site's units on the device: for this call, or until the last turn of its round."""
        round = self.turn.round if self.turn is not None and not self._depth else None
        if round is not None and round.site is site:
            staged = self._stay.begin(round)
            try:
                yield staged
            finally:
                if not recompute:
                    round.to_come -= 1
                    if not round.to_come:
                        self._stay.end()
            return
        if not self._depth:
            self._stay.end()  # nothing may be held that somebody waits for
        staged = self._residency.acquire(site.units)
        try:
            yield staged
        finally:
            self._residency.release(site.units)

    def num_updates(self, site: CallSite) -> tuple[int, ...]:
        return tuple(self._num_updates[unit.index] for unit in site.units)

    def updates_launched(self, units: Iterable[int]) -> None:
        """A step changes the parameters of these units (by index)."""
        self._num_updates.update(units)

    def forward_made(self, site: CallSite) -> Turn:
        turn = self.turn if self.turn is not None else FIRST_TURN
        if turn.round is not None and (turn.round.site is not site or self._depth):
            turn = Turn(turn.micro_batch, None)
        if turn.round is not None:
            turn.round.calls += 1
        self.ledger.made(site, turn.micro_batch)
        return turn

    def forward_dropped(self, site: CallSite, turn: Turn) -> None:
        self.ledger.done(site, turn.micro_batch)

    def results_stashed(self, attributes: Sequence[tuple[nn.Module, str]]) -> None:
        if self._taking_turns:
            self.stashed.update(attributes)

    def boundary_held(self, nbytes: int) -> None:
        self.ledger.boundary_held(nbytes)

    def temporaries_seen(self, site: CallSite, nbytes: int) -> None:
        self.ledger.temporaries_seen(nbytes)

    def backward_begins(self, site: CallSite, turn: Turn) -> None:
        self._check_open()
        self._backward_seen()
        if self._taking_turns:
            self._visiting.append(self.turn)
            self.turn = turn
        for unit in site.units:
            for info in unit.parameters:
                info.parameter.grad = None

    def backward_ended(self, site: CallSite, turn: Turn, first_visit: bool) -> None:
        if first_visit:
            self.ledger.done(site, turn.micro_batch)
        if not self._taking_turns:
            for unit in site.units:
                private = any(self._bindings.is_private(info.parameter) for info in unit.parameters)
                more_to_come = private or not first_visit or self.ledger.pending(unit.index)
                self._gradients.flush(unit.index, more_to_come)
            return
        self.turn = self._visiting.pop()  # a call of a unit may be inside of another's
        if turn.round is not None and first_visit:
            turn.round.calls -= 1
            if not turn.round.calls:
                self._stay.end()
        for unit in site.units:
            self._gradients.flush_turn(unit.index)

    # -- backwards

    def _backward_seen(self) -> None:
        """The first node of a backward: ask autograd to tell us when the last one is done."""
        if self._in_backward:
            return
        if self.refuse_backward:
            raise RuntimeError(self.refuse_backward)
        self._refuse_set_gradients()
        if self._gradients.num_backwards >= self._micro_batches:
            raise RuntimeError(
                f"backward number {self._gradients.num_backwards + 1} of a step with "
                f"micro_batches={self._micro_batches}; call engine.step() first, or set "
                "OffloadConfig(micro_batches=...) to the number of backwards per step"
            )
        self._in_backward = True
        torch.autograd.Variable._execution_engine.queue_callback(self._backward_done)

    def _backward_done(self) -> None:
        self._gradients.end_backward()
        self._in_backward = False
        with torch.no_grad():
            for parameter in self._gradients.present():
                parameter.grad = GradientInEngine(self._bindings.placeholder(parameter), self._unscale)

    def _refuse_set_gradients(self) -> None:
        """Raises: RuntimeError if somebody has written to a parameter's `grad`, which would be lost."""
        for parameter in self._gradients.parameters:
            shown = parameter.grad
            if (shown is not None) != self._gradients.is_present(parameter) or not (
                shown is None or isinstance(shown, GradientInEngine)
            ):
                raise RuntimeError(
                    f"`.grad` of {self._gradients.name_of(parameter)!r} was set from outside, but gradients live in "
                    "the engine, so that would be lost; edit it inside `with engine.gather(..., write=True)`, or drop "
                    "all with engine.optimizer.zero_grad()"
                )

    def _take_gradient(self, parameter: nn.Parameter) -> None:
        self._gradients.take(parameter, self.turn.micro_batch if self.turn is not None else 0)


class _Hold:
    """One unit call that a thread is inside of: what it holds, and whether it computes again."""

    __slots__ = ("recompute", "staged")

    def __init__(self, staged: Sequence[Staged], recompute: bool) -> None:
        self.staged = staged
        self.recompute = recompute


class _GradientClearer:
    """Runs before autograd accumulates into a parameter: what `grad` shows between steps is no tensor to add to."""

    def __init__(self, parameter: nn.Parameter, backward_seen: Callable[[], None]) -> None:
        self._parameter = weakref.ref(parameter)
        self._backward_seen = backward_seen

    def __call__(self, gradient: Tensor) -> None:
        self._backward_seen()
        parameter = self._parameter()
        if parameter is not None and isinstance(parameter.grad, GradientInEngine):
            parameter.grad = None
