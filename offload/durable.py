"""Commits: each step that is to survive is written whole to the store and sealed, behind the next step's compute."""

from __future__ import annotations

import asyncio
import concurrent.futures
import copy
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .homes import Home, gather_all
from .layout import KINDS, UnitLayout
from .loss_scale import LossScaling
from .scheduler.devices import Device
from .scheduler.loop import LoopThread
from .scheduler.storage import NEEDED_AT_COMMIT
from .step import Stepper
from .store import Store
from .units import ParameterInfo
from .values import persistent_buffers

COMMITTED_KINDS = tuple(kind for kind in KINDS if kind != "grad")


class CommitLog:
    """Makes steps durable in the background.

    A step passes three points: `stage` (it is decided; unit by unit, as soon as it is updated, what rests in host
    memory is copied to the store), `launch` (what belongs to it besides, such as schedulers, has been captured), and
    durable.

    Invariant: between a unit's update and durable no byte of it may change in host memory, and none may enter the store
    as part of a later step. `wait`, or `under_way` awaited, stands before every such change.

    Args:
        every: steps between commits.
    """

    def __init__(
        self,
        store: Store,
        layouts: Sequence[UnitLayout],
        homes: Sequence[Mapping[str, Home]],
        loop: LoopThread,
        every: int,
    ) -> None:
        self._store = store
        self._layouts = layouts
        self._homes = homes
        self._loop = loop
        self._every = every
        self._last_staged = self.steps_done
        self._changed: dict[int, Future[None] | None] = {}
        self._written: set[int] = set()
        self._staged: tuple[int, dict[str, Any]] | None = None
        self._given_up = False
        self._copying: Future[None] | None = None
        self._committing: Future[bool] | None = None

    @property
    def steps_done(self) -> int:
        """The last step that would survive a crash now."""
        return self._store.step or 0

    @property
    def committed_state(self) -> Mapping[str, Any]:
        """What was committed with the step at which the store was re-opened."""
        return self._store.extra

    @property
    def has_changes(self) -> bool:
        """Whether something has changed that no staged step covers."""
        return bool(self._changed)

    def changed(self, units: Mapping[int, Future[None] | None]) -> None:
        """These units' values or states change, or have changed, since the last commit.

        Args:
            units: unit index -> what is done when an update of it is complete, or None if all of the unit has been
                written: what is frozen changes in no update.
        """
        self._changed.update(units)
        self._written.update(unit for unit, made in units.items() if made is None)

    def stage(self, step: int, state: dict[str, Any], force: bool = False) -> None:
        """Step `step` is final, with `state`. Never blocks. Skipped unless it is time for a commit, or `force`."""
        if self._given_up or (not force and step - self._last_staged < self._every):
            return
        self._last_staged = step
        self._staged = (step, state)
        changed, self._changed = self._changed, {}
        written, self._written = self._written, set()
        self._copying = self._loop.submit(self._copy_resting(changed, written, self._copying))

    def withdraw_staged(self) -> None:
        """Give up the step that is staged and everything after it: the step before it stays the last durable one."""
        self._staged = None
        self._given_up = True

    def launch(self, capture: Callable[[], dict[str, Any]]) -> None:
        """Commit the staged step, completed by what `capture` returns. Never blocks. Without a staged step, nothing."""
        if self._staged is None:
            return
        (step, state), self._staged = self._staged, None
        copying = self._copying
        assert copying is not None, "stage() begins the copy"
        self._committing = self._loop.submit(self._commit(step, {**state, **capture()}, copying, self._committing))

    def wait(self) -> None:
        """Block until the launched commit is durable and nothing is copied any more; raises what went wrong.

        The step's updates must have been made, or be certain to come: the commit waits for them.
        """
        for future in (self._copying, self._committing):
            if future is not None:
                future.result()
        self._committing = None

    @property
    def under_way(self) -> Future[bool] | None:
        """The commit that was launched last, which the next step's updates have to wait for."""
        return self._committing

    @property
    def can_revert(self) -> bool:
        """Whether the committed step, once `under_way` is done, is the one that all values are of now."""
        return self._every == 1 and not self._changed and self._staged is None and not self._given_up

    async def revert(self, unit: int) -> None:
        """Bring back the committed values and states of `unit`, which nobody uses or writes meanwhile."""
        self._store.revert([self._homes[unit][kind].key for kind in COMMITTED_KINDS if self._homes[unit][kind].nbytes])
        await self._read_resting(unit)

    def settle(self) -> None:
        """Block until nothing is under way, whatever came of it: a commit that is cut off would break the store."""
        under_way: list[Future[Any]] = [f for f in (self._copying, self._committing) if f is not None]
        concurrent.futures.wait(under_way)

    async def _copy_resting(
        self, changed: Mapping[int, Future[None] | None], written: Collection[int], before: Future[None] | None
    ) -> None:
        """Write to the store what these units keep in host memory, one unit after the other, as their changes end."""
        if before is not None:
            await asyncio.wrap_future(before)
        for unit, made in sorted(changed.items()):
            if made is not None:
                await asyncio.wrap_future(made)
            await gather_all(
                self._store.write(key, index, piece, needed=NEEDED_AT_COMMIT)
                for key, index, piece in self._resting_pieces(unit, with_frozen=unit in written)
            )

    async def _commit(
        self, step: int, state: dict[str, Any], copying: Future[None], before: Future[bool] | None
    ) -> bool:
        """Invariant: commits run in the order of their steps. Else a step that changed nothing (a skipped one) has
        nothing to copy and is sealed while the step before it is still being copied."""
        if before is not None:
            await asyncio.wrap_future(before)
        await asyncio.wrap_future(copying)
        return await self._store.commit(step, state, force=True)

    def restore_resting(self, unit: int) -> None:
        """Fill what `unit` keeps in host memory from the store. Blocks."""
        self._loop.run(self._read_resting(unit))

    async def _read_resting(self, unit: int) -> None:
        await gather_all(self._store.read(key, index, piece) for key, index, piece in self._resting_pieces(unit))

    def _resting_pieces(self, unit: int, with_frozen: bool = True) -> Iterator[tuple[str, int, Tensor]]:
        """(key, number, uint8 bytes) of every piece that belongs to a step and that `unit` keeps in host memory."""
        for kind in COMMITTED_KINDS:
            home = self._homes[unit][kind]
            if home.buffer is not None and (with_frozen or kind != "frozen"):
                for index in range(len(home.piece_nbytes)):
                    yield home.key, index, home.piece(index)


class RunState:
    """What belongs to a step besides parameters and moments: counts, hyperparameters, generators, buffers, and
    tracked objects.

    Args:
        stepper: knows the updates so far by trainable parameter, and whether the average has begun.
        scaling: the loss scale.
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: Sequence[ParameterInfo],
        device: Device,
        stepper: Stepper,
        optimizer: torch.optim.Optimizer,
        scaling: LossScaling,
    ) -> None:
        self._module = module
        self._scaling = scaling
        self._parameters = parameters
        self._device = device
        self._stepper = stepper
        self._counts = stepper.counts
        self._optimizer = optimizer
        self._tracked: list[Any] = []
        self._saved: dict[int, Any] = {}
        self._groups: Sequence[Mapping[str, Any]] = ()

    def capture(self, step: int) -> dict[str, Any]:
        """As of now, at the end of `step`."""
        return {
            "step": step,
            "counts": {info.name: self._counts[info.parameter] for info in self._parameters if info.trainable},
            "average_begun": self._stepper.average_begun,
            "random": {
                "torch": torch.get_rng_state(),
                "device": self._device.rng_state(),
                "python": random.getstate(),
                "numpy": np.random.get_state(legacy=False),  # noqa: NPY002
            },
            "buffers": {name: buffer.detach().cpu().clone() for name, buffer in self.buffers().items()},
            "tracked": self._states_of(late=False),
            "loss_scale": self._scaling.state_dict(),
        }

    def capture_tracked(self) -> dict[str, Any]:
        """Hyperparameters and schedulers as of now, a true copy: schedulers step after the optimizer has."""
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self._optimizer.param_groups]
        return {"groups": copy.deepcopy(groups), "schedulers": self._states_of(late=True)}

    def _states_of(self, late: bool) -> dict[int, Any]:
        """A true copy of the tracked objects' states by position: schedulers (`late`) or all others."""
        states = {
            number: copy.deepcopy(one.state_dict())
            for number, one in enumerate(self._tracked)
            if self._is_scheduler(one) == late
        }
        unclaimed = {} if late else {n: state for n, state in self._saved.items() if n >= len(self._tracked)}
        return {**unclaimed, **states}

    def _is_scheduler(self, one: Any) -> bool:
        """Whether it steps after the optimizer. So does a `GradScaler`: its `update` comes last."""
        return getattr(one, "optimizer", None) is self._optimizer or isinstance(one, torch.amp.GradScaler)

    @property
    def has_schedulers(self) -> bool:
        return any(self._is_scheduler(one) for one in self._tracked)

    def restore(self, state: Mapping[str, Any]) -> int:
        """Go back to a captured state; objects that are not tracked yet follow when they are. Returns the step."""
        for info in self._parameters:
            if info.trainable:
                self._counts[info.parameter] = state["counts"][info.name]
        # an older version has begun with the first count
        self._stepper.average_begun = state.get("average_begun", any(self._counts.values()))
        self._groups = state["groups"]
        torch.set_rng_state(state["random"]["torch"])
        self._device.set_rng_state(state["random"]["device"])
        random.setstate(state["random"]["python"])
        if "numpy" in state["random"]:  # a store of an older version has none
            np.random.set_state(state["random"]["numpy"])  # noqa: NPY002
        buffers = self.buffers()
        with torch.no_grad():
            for name, value in state["buffers"].items():
                buffers[name].copy_(value)
        self._saved = {**state["tracked"], **state["schedulers"]}
        self._scaling.load_state_dict(state.get("loss_scale", {}))
        for position, one in enumerate(self._tracked):
            if position in self._saved:
                one.load_state_dict(self._saved[position])
        self._restore_groups()  # loading a scheduler may set lr
        return int(state["step"])

    def tracked_without(self, state: Mapping[str, Any]) -> list[str]:
        """Types of the objects that are tracked now and that `state` knows nothing of."""
        known = {**state["tracked"], **state["schedulers"]}
        return [type(one).__name__ for position, one in enumerate(self._tracked) if position not in known]

    def track(self, objects: Sequence[Any]) -> None:
        """Raises: TypeError for an object without `state_dict` and `load_state_dict`."""
        for one in objects:
            if not callable(getattr(one, "state_dict", None)) or not callable(getattr(one, "load_state_dict", None)):
                raise TypeError(
                    f"track() got a {type(one).__name__}, which has no state_dict and load_state_dict; give it both, "
                    "or keep its state yourself"
                )
            position = len(self._tracked)
            if position in self._saved:
                one.load_state_dict(self._saved[position])
                if self._is_scheduler(one):
                    self._restore_groups()  # a scheduler sets lr when it is made, as if training began
            self._tracked.append(one)

    def _restore_groups(self) -> None:
        for group, saved in zip(self._optimizer.param_groups, self._groups, strict=True):
            group.update(saved)

    def buffers(self) -> dict[str, Tensor]:
        """Buffers that a state dict would hold; others (masks, rotary tables) are made anew with the module."""
        return {
            f"{prefix}.{name}" if prefix else name: buffer
            for prefix, part in self._module.named_modules()
            for name, buffer in persistent_buffers(part)
        }
