"""Updates that begin in backward: each unit's as soon as its gradient of the step is complete.

At that time the step is not decided: neither the norm is known nor whether all values are finite. Two modes begin all
the same. "backward": the user has promised that nothing hangs on that (no clipping, no skipped step). "speculative":
the step is decided as it mostly is, and where it is not, what was begun is taken back: the store still holds the
committed step in its other slots, so that going back moves no byte of what lives there.
Source: speculate, then validate, after SuperOffload's rollback; between the slots of a store it is new here.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from torch import nn

from .durable import CommitLog
from .residency import Residency
from .scheduler.loop import LoopThread
from .step import Stepper
from .units import Unit
from .update import UnitUpdate

STEPS_LOOKED_BACK_ON = 20
MIN_STEPS_SEEN = 4
"""update="auto" speculates while at most one of the last 20 steps (and of at least 4) was clipped or skipped."""


class EarlyUpdates:
    """Begins updates and, where the step turns out otherwise, takes them back.

    Args:
        groups: the optimizer's parameter groups, as they are at any time.
        log: of the store that can go back; None where nothing can.
        revocable: begin only what can be taken back.
        only_if_usual: begin only while steps are rarely clipped or skipped.
        assumed_factor: what will most likely fall on the gradients of this step: the inverse of a loss scale.
    """

    def __init__(
        self,
        stepper: Stepper,
        residency: Residency,
        units: Sequence[Unit],
        groups: Callable[[], Sequence[dict[str, Any]]],
        loop: LoopThread,
        log: CommitLog | None,
        revocable: bool,
        only_if_usual: bool,
        assumed_factor: Callable[[], float] = lambda: 1.0,
    ) -> None:
        self._stepper = stepper
        self._residency = residency
        self._units = units
        self._groups = groups
        self._loop = loop
        self._log = log
        self._revocable = revocable
        self._assumed_factor = assumed_factor
        self._groups_then: list[dict[str, Any]] | None = None
        self._factor_then: float | None = None
        self._disturbed = False
        self._made: dict[int, Future[None]] = {}
        self._updates: dict[int, UnitUpdate] = {}
        self._only_if_usual = only_if_usual
        self._unusual: deque[bool] = deque(maxlen=STEPS_LOOKED_BACK_ON)
        self._enabled = not only_if_usual

    # -- on the loop

    def landing(self, unit: int) -> None:
        """A gradient for `unit` is on its way home; if the unit's update has begun, it began too early."""
        if unit in self._made:
            self._disturbed = True

    def complete(self, unit: int) -> None:
        """The unit's gradient of this step is complete and at home."""
        if not self._enabled or (self._revocable and not (self._log is not None and self._log.can_revert)):
            return
        if self._groups_then is None:
            self._groups_then = self._hyperparameters()
            self._factor_then = self._assumed_factor()
        assert self._factor_then is not None
        try:
            update = self._stepper.prepare_unit(unit, self._groups(), self._factor_then)
        except ValueError:
            return  # step() meets the same hyperparameter, and raises
        if update is None:
            return
        if not self._made:
            self._residency.begin_left_over()
        after = self._log.under_way if self._log is not None else None
        made = self._residency.begin_early(unit, update, after)
        if made is not None:
            self._made[unit] = made
            self._updates[unit] = update

    # -- on the training thread

    def decided(self, grad_scale: float, skipped: bool) -> Mapping[int, Future[None]]:
        """The step is decided. What was begun and is right as it is; the rest has been taken back (blocks).

        Until `keep` it can still be taken back: whoever waits in between may be interrupted.
        Returns: for each such unit, what is done when its update is stored.
        """
        factor = self._assumed_factor() if self._factor_then is None else self._factor_then
        as_assumed = grad_scale == factor and not skipped
        self._unusual.append(not as_assumed)
        if not (as_assumed and not self._disturbed and self._groups_then in (None, self._hyperparameters())):
            self.take_back()
        if self._only_if_usual:
            self._enabled = len(self._unusual) >= MIN_STEPS_SEEN and sum(self._unusual) <= 1
        self._residency.end_early()
        return dict(self._made)

    def keep_begun(self) -> tuple[Mapping[int, Future[None]], list[nn.Parameter]]:
        """Where there is no way back: what was begun stays, and the rest is not made; blocks.

        Returns: for each such unit, what is done when its update is stored; and the parameters that were updated.
        """
        self._residency.end_early()
        units = [self._units[index] for index in sorted(self._made)]
        begun = self._loop.run(self._call_off(units))
        made = {unit.index: self._made[unit.index] for unit in begun}
        changed = [p for unit in begun for p in self._updates[unit.index].parameters]
        self._residency.settle(begun)
        self._forget()
        return made, changed

    async def _call_off(self, units: Sequence[Unit]) -> list[Unit]:
        return self._residency.call_off(units)

    def keep(self) -> None:
        """What was begun is now part of a step."""
        self._forget()

    @property
    def has_begun(self) -> bool:
        return bool(self._made)

    @property
    def can_take_back(self) -> bool:
        return not self._made or (self._log is not None and self._log.can_revert)

    def take_back(self) -> None:
        """Bring back the values of before for all that was begun; blocks. Nothing, if nothing was.

        Raises: RuntimeError where there is no way back.
        """
        self._residency.end_early()
        if not self._made:
            self._forget()
            return
        if self._log is None or not self.can_take_back:
            raise RuntimeError(
                'the update of this step has begun in backward and cannot be taken back: with update="backward" call '
                "step() right after the last backward, with hyperparameters set before it and without clipping; or "
                'use update="next_forward"'
            )
        units = [self._units[index] for index in sorted(self._made)]
        self._loop.run(self._revert(units, self._log))
        self._forget()

    async def _revert(self, units: Sequence[Unit], log: CommitLog) -> None:
        units = self._residency.call_off(units)
        await self._residency.withdraw(units)
        try:
            for unit in units:
                await log.revert(unit.index)
        finally:
            self._residency.admit(units)

    def _forget(self) -> None:
        self._made = {}
        self._updates = {}
        self._disturbed = False
        self._groups_then = None
        self._factor_then = None

    def _hyperparameters(self) -> list[dict[str, Any]]:
        return [copy.deepcopy({k: v for k, v in group.items() if k != "params"}) for group in self._groups()]
