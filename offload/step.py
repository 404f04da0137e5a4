"""One optimizer step is decided here: the global norm, whether to skip, and every unit's update."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from .gradients import Gradients
from .layout import UnitLayout
from .optimizers import OptimizerSpec, Scalars
from .units import ParameterInfo
from .update import UnitUpdate

CLIP_EPS = 1e-6
"""Added to the norm before the division, as `torch.nn.utils.clip_grad_norm_` does."""


@dataclass(frozen=True)
class Decision:
    """What a step will do: the norm before clipping, the factor on all gradients, and whether anything is done."""

    grad_norm: float
    grad_scale: float
    skipped: bool


@dataclass(frozen=True)
class Prepared:
    """A step that is decided: each unit's update by the unit's index, and the parameters that it changes."""

    updates: Mapping[int, UnitUpdate]
    parameters: Sequence[nn.Parameter]


def clip_factor(norm: float, max_norm: float) -> float:
    """min(1, max_norm / (norm + 1e-6)), as torch clips."""
    return min(1.0, max_norm / (norm + CLIP_EPS))


class Stepper:
    """Decides steps. Knows step counts: a parameter without a gradient does not age.

    Args:
        parameters: all of them, in the order of names in which norms are summed.
        average_decay: of the moving average of the weights, or None for none.

    Attributes:
        average_begun: whether the stored averages are meant. Until the first update they are not: the average is the
            weights themselves, whatever counts somebody has loaded.
    """

    def __init__(
        self,
        spec: OptimizerSpec,
        parameters: Sequence[ParameterInfo],
        layouts: Sequence[UnitLayout],
        gradients: Gradients,
        average_decay: float | None = None,
    ) -> None:
        self._spec = spec
        self._average_decay = average_decay
        self._by_name = [info.parameter for info in sorted(parameters, key=lambda info: info.name)]
        self._layouts = layouts
        self._gradients = gradients
        self.counts = {info.parameter: 0 for info in parameters if info.trainable}
        self.average_begun = False

    def norm(self) -> float:
        """Global 2-norm of the gradients accumulated so far. Blocks until they have all come home."""
        self._gradients.wait()
        return math.sqrt(self._gradients.total_square(self._by_name))

    def decide(
        self,
        grad_scale: float,
        clip_grad_norm: float | None,
        loss: float | None,
        may_skip: bool = True,
        unscale: float = 1.0,
    ) -> Decision:
        """Look at all gradients. Nothing is changed yet.

        Args:
            grad_scale: the factor that clipping has put on the unscaled gradients so far.
            unscale: the inverse of the loss scale that is in the gradients; the reported norm is without it.
        """
        norm = self.norm()
        finite = not may_skip or (math.isfinite(norm) and (loss is None or math.isfinite(loss)))
        norm *= unscale
        if finite and clip_grad_norm is not None:
            grad_scale *= clip_factor(norm * grad_scale, clip_grad_norm)
        return Decision(norm, grad_scale * unscale, not finite)

    def prepare(
        self, groups: Sequence[dict[str, object]], grad_scale: float, without: Collection[int] = ()
    ) -> Prepared:
        """Fix everything the update depends on, as it is now. Nothing is changed yet.

        Args:
            without: units (by index) whose update of this step has begun already.

        Raises: ValueError for a hyperparameter out of range.
        """
        scalars = self._scalars(groups, self._gradients.present())
        updates = {}
        for layout in self._layouts:
            update = self._update(layout, scalars, grad_scale)
            if update is not None and layout.unit.index not in without:
                updates[layout.unit.index] = update
        return Prepared(updates, list(scalars))

    def prepare_unit(
        self, unit: int, groups: Sequence[dict[str, object]], grad_scale: float = 1.0
    ) -> UnitUpdate | None:
        """One unit's update before the step is decided, with a factor that is assumed; None if it has no gradient.

        Raises: ValueError for a hyperparameter out of range.
        """
        layout = self._layouts[unit]
        present = {p for p in layout.by_parameter if self._gradients.is_present(p)}
        return self._update(layout, self._scalars(groups, present), grad_scale) if present else None

    def _scalars(
        self, groups: Sequence[dict[str, object]], present: Collection[nn.Parameter]
    ) -> dict[nn.Parameter, Scalars]:
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
        return scalars

    def _update(
        self, layout: UnitLayout, scalars: Mapping[nn.Parameter, Scalars], grad_scale: float
    ) -> UnitUpdate | None:
        mine = {p: scalars[p] for p in layout.by_parameter if p in scalars}
        average_weight = None if self._average_decay is None or not layout.nbytes("states") else self._average_weight()
        if not mine and average_weight is None:
            return None
        return UnitUpdate(self._spec, layout, mine, grad_scale, average_weight)

    def _average_weight(self) -> float:
        """The first update makes the average the weights themselves, as `torch.optim.swa_utils.AveragedModel` does."""
        assert self._average_decay is not None
        return 1.0 - self._average_decay if self.average_begun else 1.0

    def book(self, prepared: Prepared) -> None:
        """The parameters of a prepared update age by one step; all averages take in their weights."""
        self.average_begun = True
        for parameter in prepared.parameters:
            self.counts[parameter] += 1
