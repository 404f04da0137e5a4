"""Micro-batches that take turns: whose turn a call was, what stays on the device between turns, and their sums.

In a vertical pass all micro-batches of a step visit a call site one after another (`vertical.py`), in forward and again
in backward; such a visit is a round. To everything else the pass is several forwards and backwards, one per
micro-batch, and this file keeps them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from torch import Tensor, nn

from .residency import Residency
from .staged import Staged
from .units import CallSite


class Round:
    """One visit of `site` by several micro-batches.

    `to_come` counts the turns that forward still has to give, `calls` those made that backward has still to visit.
    """

    __slots__ = ("calls", "site", "to_come")

    def __init__(self, site: CallSite, turns: int) -> None:
        self.site = site
        self.to_come = turns
        self.calls = 0


class Turn(NamedTuple):
    """A micro-batch, by its number in the step, and the round in which it has its turn; None outside of rounds."""

    micro_batch: int
    round: Round | None


class Stay:
    """Keeps the units of one round on the device until its last turn, so that they are fetched once for all."""

    def __init__(self, residency: Residency) -> None:
        self._residency = residency
        self._round: Round | None = None
        self._staged: list[Staged] = []

    def begin(self, round: Round) -> list[Staged]:
        """The units of `round`, on the device until `end`. The stay of another round ends: there may be room for one.

        Raises: as `Residency.acquire`.
        """
        if self._round is not round:
            self.end()
            self._staged = self._residency.acquire(round.site.units)
            self._round = round
        return self._staged

    def end(self) -> None:
        if self._round is not None:
            round, self._round, self._staged = self._round, None, []
            self._residency.release(round.site.units)


class TurnSums:
    """Gradients of a backward that visits all micro-batches of a step at once, kept apart and then added up.

    The numbers are those of one backward per micro-batch: what belongs to one micro-batch is summed in the compute
    dtype, and micro-batches are added in fp32 in their order, each when it is complete. A unit leaves when all of it is
    complete, so its gradient goes home once per step.

    Args:
        num: micro-batches.
        unit_of: parameter -> index of its unit.
        is_open: (unit, micro-batch) -> whether contributions to the unit's gradients may still come.
    """

    def __init__(self, num: int, unit_of: dict[nn.Parameter, int], is_open: Callable[[int, int], bool]) -> None:
        self.num = num
        self._unit_of = unit_of
        self._is_open = is_open
        self._harvest: dict[tuple[int, nn.Parameter], Tensor] = {}
        self._totals: dict[nn.Parameter, Tensor] = {}
        self._num_added: dict[int, int] = {}

    def take(self, micro_batch: int, parameter: nn.Parameter, gradient: Tensor) -> None:
        key = micro_batch, parameter
        held = self._harvest.get(key)
        self._harvest[key] = gradient if held is None else held + gradient

    def complete(self, unit: int) -> dict[nn.Parameter, Tensor]:
        """Add up what is complete of `unit`; its gradients (fp32) once nothing more can come, else nothing."""
        for micro_batch in range(self._num_added.get(unit, 0), self.num):
            if self._is_open(unit, micro_batch):
                return {}
            self._add(unit, micro_batch)
            self._num_added[unit] = micro_batch + 1
        return self._leave(unit)

    def rest(self) -> Iterable[tuple[int, dict[nn.Parameter, Tensor]]]:
        """Backward is over, so everything is complete: each unit that has not left, with its gradients (fp32)."""
        for unit in sorted({self._unit_of[p] for _, p in self._harvest} | {self._unit_of[p] for p in self._totals}):
            for micro_batch in range(self.num):
                self._add(unit, micro_batch)
            yield unit, self._leave(unit)

    def _add(self, unit: int, micro_batch: int) -> None:
        for key in [k for k in self._harvest if k[0] == micro_batch and self._unit_of[k[1]] == unit]:
            gradient, total = self._harvest.pop(key), self._totals.get(key[1])
            # Never in place: what autograd leaves may share memory with something that is still needed.
            self._totals[key[1]] = gradient.float() if total is None else total + gradient.float()

    def _leave(self, unit: int) -> dict[nn.Parameter, Tensor]:
        mine = [parameter for parameter in self._totals if self._unit_of[parameter] == unit]
        return {parameter: self._totals.pop(parameter) for parameter in mine}
