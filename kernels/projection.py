"""perpGrad: remove from the gradient its component along the weights, keep its length.

    g_perp = g - (<w,g> / <w,w>) w        g_final = g_perp * |g| / |g_perp|

Per parameter tensor, with the fp32 master as w, on the raw gradient before the optimizer. Prieto et al., Grokking at
the Edge of Numerical Stability, arXiv:2501.04697. |g_perp|^2 = <g,g> - <w,g>^2 / <w,w>, so one pass gives all sums and
a second one applies them. A tensor that is spread over chunks adds the chunks' sums first: projecting each chunk
alone would be another algorithm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from .checks import FLOATS, check_dtype, check_flat, check_master
from .dispatch import backend
from .factors import float32

_NOTHING_LEFT = 1e-12  # of |g|^2; below it g_perp is the rounding of float32 numbers


@dataclass(frozen=True, kw_only=True)
class ProjectionSums:
    """<w,g>, <w,w>, <g,g> over a tensor or a chunk of one; add the chunks' sums in a fixed order."""

    weight_grad: float
    weight_weight: float
    grad_grad: float

    def __add__(self, other: ProjectionSums) -> ProjectionSums:
        return ProjectionSums(
            weight_grad=self.weight_grad + other.weight_grad,
            weight_weight=self.weight_weight + other.weight_weight,
            grad_grad=self.grad_grad + other.grad_grad,
        )

    def factors(self) -> tuple[float, float]:
        """(coefficient, rescale) of `project_`, from the sums over the whole tensor.

        (0, 1), the gradient as it is, when the weights are zero or a sum is not finite. Rescale is 0, no update, when
        nothing perpendicular is left, as in a tensor of one element.
        """
        finite = math.isfinite(self.weight_grad + self.weight_weight + self.grad_grad)
        if not finite or self.weight_weight == 0.0:
            return 0.0, 1.0
        coefficient = self.weight_grad / self.weight_weight
        perpendicular = self.grad_grad - self.weight_grad * coefficient
        if perpendicular <= _NOTHING_LEFT * self.grad_grad:
            return coefficient, 0.0
        return coefficient, math.sqrt(self.grad_grad / perpendicular)


def projection_sums(param: Tensor, low: Tensor | None, grad: Tensor) -> ProjectionSums:
    """The three sums in float64, each in the order of `gradient.squared_norm`. Waits for the device.

    Args:
        param, low: [n] a master as in `optimizer.adam_`; grad: [n] fp32, bf16 or fp16.
    Raises: ValueError for other dtypes, lengths, layouts or devices.
    """
    if not _check(param, low, grad):
        return ProjectionSums(weight_grad=0.0, weight_weight=0.0, grad_grad=0.0)
    weight_grad, weight_weight, grad_grad = backend(param.device).projection_sums(param, low, grad)
    return ProjectionSums(weight_grad=weight_grad, weight_weight=weight_weight, grad_grad=grad_grad)


def project_(param: Tensor, low: Tensor | None, grad: Tensor, coefficient: float, rescale: float) -> None:
    """grad = (grad - w * coefficient) * rescale, in float32, rounded to the dtype of `grad`.

    Args:
        param, low, grad: as in `projection_sums`; `grad` is written.
        coefficient, rescale: from `ProjectionSums.factors` of the whole tensor; rounded to float32.
    Raises: ValueError for other dtypes, lengths, layouts or devices.
    """
    if _check(param, low, grad):
        backend(param.device).project_(param, low, grad, float32(coefficient), float32(rescale))


def _check(param: Tensor, low: Tensor | None, grad: Tensor) -> int:
    n = check_flat(param=param, low=low, grad=grad)
    check_master(param, low)
    check_dtype("grad", grad, *FLOATS)
    return n
