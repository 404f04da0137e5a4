"""One optimizer step: the global norm, the decision to skip, and every unit's update."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from .gradients import Gradients
from .homes import ChunkStream, Home, gather_all
from .layout import UnitLayout
from .optimizers import OptimizerSpec, Scalars
from .residency import Residency
from .scheduler.loop import LoopThread
from .units import ParameterInfo
from .update import UnitUpdate

CLIP_EPS = 1e-6
"""Added to the norm before the division, as `torch.nn.utils.clip_grad_norm_` does."""

UPDATES_IN_FLIGHT = 2


@dataclass(frozen=True)
class Decision:
    """What a step will do: the norm before clipping, the factor on all gradients, and whether anything is done."""

    grad_norm: float
    grad_scale: float
    skipped: bool


@dataclass(frozen=True)
class Prepared:
    """An update that is ready to run: each unit's, in order of use, and the parameters that it changes."""

    work: Sequence[tuple[UnitLayout, UnitUpdate]]
    parameters: Sequence[nn.Parameter]

    @property
    def units(self) -> list[int]:
        return [layout.unit.index for layout, _ in self.work]


class UpdateInterrupted(KeyboardInterrupt):
    """Ctrl-C came during an update, which is whole all the same."""


def clip_factor(norm: float, max_norm: float) -> float:
    """min(1, max_norm / (norm + 1e-6)), as torch clips."""
    return min(1.0, max_norm / (norm + CLIP_EPS))


class Stepper:
    """Runs steps. Knows step counts: a parameter without a gradient does not age.

    Args:
        parameters: all of them, in the order of names in which norms are summed.
    """

    def __init__(
        self,
        spec: OptimizerSpec,
        parameters: Sequence[ParameterInfo],
        layouts: Sequence[UnitLayout],
        homes: Sequence[dict[str, Home]],
        gradients: Gradients,
        residency: Residency,
        stream: ChunkStream,
        loop: LoopThread,
    ) -> None:
        self._spec = spec
        self._by_name = [info.parameter for info in sorted(parameters, key=lambda info: info.name)]
        self._layouts = layouts
        self._homes = homes
        self._gradients = gradients
        self._residency = residency
        self._stream = stream
        self._loop = loop
        self.counts = {info.parameter: 0 for info in parameters if info.trainable}

    def norm(self) -> float:
        """Global 2-norm of the gradients accumulated so far. Blocks until they have all come home."""
        self._gradients.wait()
        return math.sqrt(self._gradients.total_square(self._by_name))

    def decide(self, grad_scale: float, clip_grad_norm: float | None, loss: float | None) -> Decision:
        """Look at all gradients. Nothing is changed yet."""
        norm = self.norm()
        finite = math.isfinite(norm) and (loss is None or math.isfinite(loss))
        if finite and clip_grad_norm is not None:
            grad_scale *= clip_factor(norm * grad_scale, clip_grad_norm)
        return Decision(norm, grad_scale, not finite)

    def prepare(self, groups: Sequence[dict[str, object]], grad_scale: float) -> Prepared:
        """Fix everything the update depends on, as it is now. Nothing is changed yet.

        Raises: ValueError for a hyperparameter out of range.
        """
        present = self._gradients.present()
        scalars: dict[nn.Parameter, Scalars] = {}
        for group in groups:
            self._spec.check(group)
            made: dict[int, Scalars] = {}
            for parameter in group["params"]:  # type: ignore[attr-defined]
                if parameter in present:
                    count = self.counts[parameter] + 1
                    if count not in made:
                        made[count] = self._spec.scalars(group, count)
                    scalars[parameter] = made[count]
        work = []
        for layout in self._layouts:
            mine = {p: scalars[p] for p in layout.by_parameter if p in scalars}
            if mine:
                work.append((layout, UnitUpdate(self._spec, layout, mine, grad_scale)))
        return Prepared(work, list(scalars))

    def update(self, prepared: Prepared) -> None:
        """Run a prepared update; its parameters age by one step. Blocks until all is written back.

        An interrupt from the keyboard is raised once the update is whole: half of one could not be gone on from.
        """
        future = self._loop.submit(self._run(prepared.work))
        interrupt = None
        try:
            future.result()
        except KeyboardInterrupt as error:
            future.result()
            interrupt = UpdateInterrupted(*error.args)
        for parameter in prepared.parameters:
            self.counts[parameter] += 1
        if interrupt is not None:
            raise interrupt

    async def _run(self, work: Sequence[tuple[UnitLayout, UnitUpdate]]) -> None:
        """Units in order of use, a few at a time, so that reads, updates and writes of neighbours overlap."""
        units = [layout.unit for layout, _ in work]
        await self._residency.withdraw(units)
        gate = asyncio.Semaphore(UPDATES_IN_FLIGHT)

        async def one(layout: UnitLayout, update: UnitUpdate) -> None:
            async with gate:
                await update.run(self._stream, self._homes[layout.unit.index])
            self._residency.admit([layout.unit])

        await gather_all(one(layout, update) for layout, update in work)
