"""Hyperparameters of one update as the float32 numbers that the kernels multiply with.

Each is computed in float64 on the host and rounded to float32 once, so that every implementation gets the same bits.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True, kw_only=True)
class AdamScalars:
    """Hyperparameters of one parameter range at one step of Adam or AdamW.

    Raises: ValueError, when made, for a step below 1, a beta outside [0, 1) or a negative eps.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int  # >= 1: the number of this update of this range (bias correction)
    decoupled: bool  # True: AdamW; False: Adam with the decay (L2) added to the gradient
    maximize: bool = False

    def __post_init__(self) -> None:
        if self.step < 1:
            raise ValueError(f"AdamScalars.step is {self.step}; the first update of a range is step 1.")
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"AdamScalars.{name} is {beta}; expected 0 <= {name} < 1.")
        if not self.eps >= 0.0:
            raise ValueError(f"AdamScalars.eps is {self.eps}; expected eps >= 0.")


@dataclass(frozen=True, kw_only=True)
class SgdScalars:
    """Hyperparameters of one parameter range at one step of SGD.

    Raises: ValueError, when made, for Nesterov momentum without momentum or with dampening.
    """

    lr: float
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool
    first: bool  # no momentum buffer yet: the buffer becomes the gradient, undampened
    maximize: bool = False

    def __post_init__(self) -> None:
        if self.nesterov and (self.momentum <= 0.0 or self.dampening != 0.0):
            raise ValueError(
                f"Nesterov momentum needs momentum > 0 and dampening 0; got momentum {self.momentum}, "
                f"dampening {self.dampening}."
            )


@dataclass(frozen=True, kw_only=True)
class AdamFactors:
    """Float32 values, see `optimizer.adam_` for the formula they stand in."""

    grad_scale: float  # negative to maximise
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    eps: float  # eps * sqrt(1 - beta2 ** step)
    step_size: float  # lr * sqrt(1 - beta2 ** step) / (1 - beta1 ** step)
    decay: float  # lr * weight_decay if decoupled, else 0
    l2: float  # weight_decay if not decoupled, else 0


@dataclass(frozen=True, kw_only=True)
class SgdFactors:
    """Float32 values, see `optimizer.sgd_` for the formula they stand in."""

    grad_scale: float  # negative to maximise
    lr: float
    momentum: float
    one_minus_dampening: float
    l2: float
    nesterov: bool
    first: bool


def float32(value: float) -> float:
    """`value` rounded to the nearest float32; beyond its range an infinity."""
    return ctypes.c_float(value).value


@lru_cache(maxsize=256)  # the chunks of a range come one after the other with the same scalars
def adam_factors(scalars: AdamScalars, grad_scale: float) -> AdamFactors:
    """The factors of one Adam update whose gradient is to be multiplied by `grad_scale` first."""
    bias1 = 1.0 - scalars.beta1**scalars.step
    root_bias2 = math.sqrt(1.0 - scalars.beta2**scalars.step)
    scale = float32(grad_scale)
    return AdamFactors(
        grad_scale=-scale if scalars.maximize else scale,
        one_minus_beta1=float32(1.0 - scalars.beta1),
        beta2=float32(scalars.beta2),
        one_minus_beta2=float32(1.0 - scalars.beta2),
        eps=float32(scalars.eps * root_bias2),
        step_size=float32(scalars.lr * root_bias2 / bias1),
        decay=float32(scalars.lr * scalars.weight_decay) if scalars.decoupled else 0.0,
        l2=0.0 if scalars.decoupled else float32(scalars.weight_decay),
    )


@lru_cache(maxsize=256)
def sgd_factors(scalars: SgdScalars, grad_scale: float) -> SgdFactors:
    """The factors of one SGD update whose gradient is to be multiplied by `grad_scale` first."""
    scale = float32(grad_scale)
    return SgdFactors(
        grad_scale=-scale if scalars.maximize else scale,
        lr=float32(scalars.lr),
        momentum=float32(scalars.momentum),
        one_minus_dampening=float32(1.0 - scalars.dampening),
        l2=float32(scalars.weight_decay),
        nesterov=scalars.nesterov,
        first=scalars.first,
    )
