"""The vertical schedule: all micro-batches of a step in one pass, so that a unit comes to the device once for all.

[Note: forwards that take turns] Each micro-batch's forward runs in a greenlet, a second stack in the same thread, and
is paused whenever it is about to call a unit. When all of them wait for the same unit they have their turns, the last
micro-batch first: autograd numbers nodes as they are made and visits the highest number first, so one backward from
all losses then meets each unit's calls together, in the order of micro-batches. Nothing is asked of the module but
that its micro-batches call units in the same order; it may be no list of layers at all.
Source: the vertical order of visits for gradient accumulation, Liang et al. (StronghHold), Zhao et al. (GreedySnake).
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from .ambient import RandomState, Surroundings, fixed_surroundings
from .calls import named_buffer_slots
from .carriers import Carriers
from .runtime import CallRuntime
from .turns import Round, Turn
from .units import CallSite, ParameterInfo

log = logging.getLogger("offload")

LossFn = Callable[[Any, Any], Tensor]
REDUCTIONS = ("mean", "sum")
_MISSING = object()


class VerticalSchedule:
    """Runs the forwards and backwards of one step, in turns where that is possible and one by one where it is not.

    Args:
        call: the module as the engine calls it.
        backward: one backward as the engine makes it.
        note: takes a loss (0-dim) whose backward was made here.
        micro_batches: the most that a step has.
        scaled: what a backward begins from, given the loss.
    """

    def __init__(
        self,
        call: Callable[..., Any],
        backward: Callable[[Tensor], None],
        note: Callable[[Tensor], None],
        module: nn.Module,
        parameters: Sequence[ParameterInfo],
        runtime: CallRuntime,
        micro_batches: int,
        scaled: Callable[[Tensor], Tensor],
    ) -> None:
        self._call = call
        self._backward = backward
        self._note = note
        self._module = module
        self._trainable = [info.parameter for info in parameters if info.trainable]
        self._runtime = runtime
        self._micro_batches = micro_batches
        self._scaled = scaled
        self._obstacle: str | None = None
        self._looked_at_buffers = False

    def run(self, batches: Sequence[Any], loss_fn: LossFn | None, reduction: str) -> tuple[int, bool]:
        """Forwards and backwards of all `batches`, and nothing else. Returns how many they are and whether they took
        turns.

        Raises: ValueError for a number of batches or a reduction that does not work; RuntimeError where the step has
        gradients already; TypeError for a loss that is none. What a forward raises passes through.
        """
        batches = self._checked(batches, reduction)
        device = self._runtime.device
        seed = int(torch.randint(1 << 62, (), device="cpu"))
        after = RandomState.capture(device)

        def loss_of(number: int) -> Tensor:
            loss = _as_loss(self._call, loss_fn, batches[number])
            return loss / len(batches) if reduction == "mean" else loss

        try:
            streams = [RandomState.seeded(seed + number, device) for number in range(len(batches))]
            turns = len(batches) > 1 and not self._is_obstructed() and self._in_turns(loss_of, streams)
            if not turns:
                for number, stream in enumerate(streams):
                    stream.restore(device)
                    self._backward(loss_of(number))
        finally:
            after.restore(device)
        return len(batches), turns

    def _checked(self, batches: Sequence[Any], reduction: str) -> list[Any]:
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction={reduction!r}; give one of {REDUCTIONS}")
        if isinstance(batches, (Tensor, Mapping)):
            raise ValueError(f"batches is one {type(batches).__name__}; give a list of micro-batches, one or more")
        batches = list(batches)
        if not 0 < len(batches) <= self._micro_batches:
            raise ValueError(
                f"train_step was given {len(batches)} micro-batches, and a step has 1 to {self._micro_batches}; give "
                "as many, or set OffloadConfig(micro_batches=...)"
            )
        self._runtime.check_whole()
        if self._runtime.accumulating or self._runtime.computing:
            raise RuntimeError(
                "train_step makes a whole step, but this one has begun with a forward or backward of its own; finish "
                "it with engine.step(partial=True), or drop it with engine.optimizer.zero_grad()"
            )
        return batches

    # -- one by one, because turns would give something else

    def _is_obstructed(self) -> bool:
        # A hook would not see what a leaf of a turn gets.
        if self._obstacle is None and self._runtime.hooks.on(self._trainable):
            self._give_up("a parameter has gradient hooks of its own")
        return self._obstacle is not None

    def _give_up(self, why: str) -> None:
        """From the next step on micro-batches run one by one. Said once."""
        if self._obstacle is None:
            self._obstacle = why
            log.warning(
                "train_step runs micro-batches one after another, so each fetches the parameters anew: %s; results are "
                "the same",
                why,
            )

    # -- in turns, see [Note: forwards that take turns]

    def _in_turns(self, loss_of: Callable[[int], Tensor], streams: Sequence[RandomState]) -> bool:
        """Returns whether the step's backwards were made. If not, nothing was done that lasts."""
        before = ModuleState(self._module, self._by_value())
        with self._runtime.taking_turns(len(streams)):
            try:
                losses = Forwards(self._runtime, loss_of, streams, before, self._give_up).run()
            except Exception:
                if before.look():
                    raise  # else it may come of what one forward has found of another, and they get another try
            changed = before.changed_beside(self._runtime.stashed)
            if changed is None:
                torch.autograd.backward([self._scaled(loss) for loss in losses])
        if changed is not None:
            self._give_up(f"forward changes {changed}")
            before.restore()
            return False
        self._looked_at_buffers = True
        for loss in losses:
            self._note(loss.detach())
        return True

    def _by_value(self) -> bool:
        """Whether to compare buffers by value, for which an accelerator makes the host wait: there, once."""
        return not self._looked_at_buffers or self._runtime.device.torch_device.type == "cpu"


class Forward:
    """One micro-batch's forward: where it waits, and all that surrounds it while others run."""

    __slots__ = ("attributes", "greenlet", "loss", "number", "site", "surroundings")

    def __init__(self, number: int, surroundings: Surroundings) -> None:
        self.number = number
        self.surroundings = surroundings
        self.attributes: dict[tuple[nn.Module, str], Any] = {}
        self.site: CallSite | None = None
        self.loss: Tensor | None = None
        self.greenlet: greenlet


class Forwards:
    """The forwards of one step, taking turns in the calling thread.

    Args:
        loss_of: number of a micro-batch -> its loss. Run with the micro-batch's own random stream.
        before: the module's attributes as they were, for those that calls leave tensors in.
        irregular: told why turns do not go on as they should; results are right all the same.
    """

    def __init__(
        self,
        runtime: CallRuntime,
        loss_of: Callable[[int], Tensor],
        streams: Sequence[RandomState],
        before: ModuleState,
        irregular: Callable[[str], None],
    ) -> None:
        self._runtime = runtime
        self._device = runtime.device
        self._loss_of = loss_of
        self._before = before
        self._irregular = irregular
        self._caller = getcurrent()
        self._entry = Surroundings.capture(self._device)
        self._fixed = fixed_surroundings()
        self._closing = False
        self._forwards = [Forward(number, self._entry.with_random(stream)) for number, stream in enumerate(streams)]
        self._running = self._forwards[0]
        for forward in self._forwards:
            forward.greenlet = greenlet(self._run_one)
            forward.greenlet.gr_context = contextvars.copy_context()

    def run(self) -> list[Tensor]:
        """Run all to their ends. Returns the losses, in the order of micro-batches.

        Raises: what a forward raised; the others are closed then, as generators are.
        """
        self._runtime.pause = self._pause
        try:
            for forward in reversed(self._forwards):
                self._resume(forward, None)
            while waiting := [forward for forward in reversed(self._forwards) if forward.site is not None]:
                self._give_turns(waiting)
            self._show_attributes(self._forwards[-1])
        finally:
            self._close()
        return [forward.loss for forward in self._forwards if forward.loss is not None]

    def _give_turns(self, waiting: Sequence[Forward]) -> None:
        """One round. Where not all wait for the same call, those for what the model has first: others may catch up."""
        site = min((f.site for f in waiting if f.site is not None), key=lambda site: site.units[0].index)
        together = [forward for forward in waiting if forward.site is site]
        if len(together) < len(self._forwards):
            self._irregular(f"they do not all call {site.name!r} at the same point")
        round = Round(site, len(together))
        for forward in together:
            self._resume(forward, round)

    def _resume(self, forward: Forward, round: Round | None) -> None:
        """Let `forward` run until it waits again or is through."""
        self._running = forward
        self._runtime.turn = Turn(forward.number, round)
        forward.site = None
        forward.surroundings.restore(self._device)
        self._show_attributes(forward)
        forward.greenlet.switch(forward)
        forward.attributes = {key: vars(key[0]).get(key[1], _MISSING) for key in self._runtime.stashed}

    def _show_attributes(self, forward: Forward) -> None:
        """Module attributes in which calls leave tensors are each micro-batch's own."""
        for module, name in self._runtime.stashed:
            value = forward.attributes.get((module, name), self._before.attribute(module, name))
            if value is _MISSING:
                vars(module).pop(name, None)
            else:
                vars(module)[name] = value

    # -- in the forward's greenlet

    def _run_one(self, forward: Forward) -> None:
        forward.loss = self._loss_of(forward.number)

    def _pause(self, site: CallSite) -> None:
        """The running forward is about to call `site`: wait for its turn."""
        forward = self._running
        if getcurrent() is not forward.greenlet:
            return  # a thread or greenlet of the module's own
        if self._closing:
            raise GreenletExit
        if fixed_surroundings() != self._fixed:
            self._irregular(f"{site.name!r} is called inside of a mode that cannot be left for a while")
            return
        if not self._before.look():
            return  # what this forward has put into a list must not be seen by others: it goes on to its end
        forward.site = site
        forward.surroundings = Surroundings.capture(self._device)
        self._caller.switch()

    def _close(self) -> None:
        """End forwards that are under way: their `finally` blocks run, and no more units are called.

        Invariant: all of it is done, also when Ctrl-C comes in between: half of it would leave the calling thread in
        the modes of a micro-batch, without gradients for instance.
        """
        self._closing = True
        interrupt = None
        ends: list[Callable[[], None]] = [functools.partial(self._end, forward) for forward in self._forwards]
        for work in [*ends, self._leave]:
            done = False
            while not done:
                try:
                    work()
                    done = True
                except KeyboardInterrupt as error:
                    interrupt = error
        if interrupt is not None:
            raise interrupt

    def _end(self, forward: Forward) -> None:
        if forward.greenlet and not forward.greenlet.dead:
            forward.surroundings.restore(self._device)
            self._running = forward
            with contextlib.suppress(Exception):  # the first error is the one that is raised
                forward.greenlet.throw()

    def _leave(self) -> None:
        self._runtime.turn, self._runtime.pause = None, None
        self._entry.restore(self._device)


class ModuleState:
    """Buffers and attributes of all modules below `module`, to notice and to undo what a forward changes.

    Attributes are compared by identity (simple values by value), lists and dicts among them by the tensors that they
    hold, also each time that a micro-batch waits (`look`): what one leaves there another would find.

    Args:
        by_value: whether buffers are compared by value; else by object and version, which some operators bypass.
    """

    def __init__(self, module: nn.Module, by_value: bool) -> None:
        self._by_value = by_value
        self._attributes = [(name, part, dict(vars(part))) for name, part in module.named_modules()]
        self._of = {part: attributes for _, part, attributes in self._attributes}
        self._owners = [(part._buffers, dict(part._buffers)) for part in module.modules()]
        self._contents = Carriers.of_attributes(module).save(lambda held: held)
        self._held = True
        self._buffers = [
            (name, owner, key, buffer, _version(buffer), buffer.detach().clone())
            for name, owner, key, buffer in named_buffer_slots(module)
        ]

    def look(self) -> bool:
        """Whether lists and dicts have held what they held before, now and each time anybody looked."""
        self._held = self._held and self._contents.is_as_it_was()
        return self._held

    def attribute(self, module: nn.Module, name: str) -> Any:
        return self._of[module].get(name, _MISSING)

    def changed_beside(self, known: set[tuple[nn.Module, str]]) -> str | None:
        """What differs now, if anything beside the attributes `known`, in words."""
        if any(now.keys() != before.keys() for now, before in self._owners):
            return "which buffers there are"
        for name, owner, key, buffer, version, copy in self._buffers:
            now = owner._buffers[key]
            if now is not buffer or _version(buffer) != version or (self._by_value and not _equal(buffer, copy)):
                return f"the buffer {name!r}"
        for name, part, before in self._attributes:
            now_attributes = vars(part)
            for key in before.keys() | now_attributes.keys():
                if not _same(before.get(key, _MISSING), now_attributes.get(key, _MISSING)) and (part, key) not in known:
                    return f"the attribute {f'{name}.{key}' if name else key!r}"
        return None if self.look() else "which tensors a list or dict among the modules' attributes holds"

    def restore(self) -> None:
        for _, part, before in self._attributes:
            for key in vars(part).keys() - before.keys():
                del vars(part)[key]
            vars(part).update(before)
        self._contents.restore(lambda held: held)
        for now, before in self._owners:
            now.clear()
            now.update(before)
        with torch.no_grad():
            for *_, buffer, _, copy in self._buffers:
                if not _equal(buffer, copy):
                    buffer.copy_(copy)


def _version(buffer: Tensor) -> int:
    return 0 if buffer.is_inference() else buffer._version


def _equal(one: Tensor, other: Tensor) -> bool:
    """Equal shapes and values, with NaN equal to itself."""
    return torch.equal(one, other) or (
        one.shape == other.shape
        and one.is_floating_point()
        and bool(((one == other) | (one.isnan() & other.isnan())).all())
    )


def _same(one: Any, other: Any) -> bool:
    return one is other or (
        type(one) is type(other)
        and isinstance(one, (bool, int, float, str, torch.Size, torch.dtype, torch.device))
        and one == other
    )


def _as_loss(call: Callable[..., Any], loss_fn: LossFn | None, batch: Any) -> Tensor:
    """One micro-batch's forward, up to its loss."""
    if isinstance(batch, Mapping):
        result = call(**batch)
    elif isinstance(batch, (tuple, list)):
        result = call(*batch)
    else:
        result = call(batch)
    loss: Any
    if loss_fn is not None:
        loss = loss_fn(result, batch)
    elif isinstance(result, Mapping):
        loss = result.get("loss")
    else:
        loss = result if isinstance(result, Tensor) else getattr(result, "loss", None)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = "loss_fn(result, batch)" if loss_fn is not None else "the module"
        found = f"a tensor {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise TypeError(
            f"{what} gave {found} for a loss; give a tensor of one element, or a result that has one as `.loss` or "
            '["loss"], or give train_step(batches, loss_fn=...)'
        )
    return loss
