"""The loss scale: small float16 gradients are kept from vanishing by scaling the loss, and unscaled in the update."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BUILT_IN = 'OffloadConfig(loss_scale="dynamic")'


@dataclass(frozen=True, kw_only=True)
class DynamicLossScale:
    """A loss scale that follows the gradients, with the arguments and the rules of `torch.amp.GradScaler`.

    A step whose gradients are not finite is skipped and the scale multiplied by `backoff_factor`; after
    `growth_interval` steps in a row without one it is multiplied by `growth_factor`.

    Raises: ValueError for a number that cannot work.
    """

    init_scale: float = 2.0**16
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000

    def __post_init__(self) -> None:
        if not 0 < self.init_scale < math.inf:
            raise ValueError(f"init_scale={self.init_scale!r}; give a positive number")
        if not 1 < self.growth_factor < math.inf:
            raise ValueError(f"growth_factor={self.growth_factor!r}; give a number above 1")
        if not 0 < self.backoff_factor < 1:
            raise ValueError(f"backoff_factor={self.backoff_factor!r}; give a number between 0 and 1")
        if not self.growth_interval >= 1:
            raise ValueError(f"growth_interval={self.growth_interval!r}; give a number of steps >= 1")


class LossScaling:
    """The scale of one engine's losses; used by the training thread.

    A `torch.amp.GradScaler` of the user's takes its place where none is built in: `unscale` is what its `unscale_`
    comes to, and the factor then belongs to the gradients of this step.

    Args:
        setting: see `OffloadConfig.loss_scale`.
        updates_in_backward: units are updated before a `GradScaler` can have unscaled anything.
    """

    def __init__(self, setting: str | float | DynamicLossScale | None, updates_in_backward: bool = False) -> None:
        self._updates_in_backward = updates_in_backward
        self._rule = DynamicLossScale() if setting == "dynamic" else setting
        self._scale: float | None = None
        if isinstance(self._rule, DynamicLossScale):
            self._scale = float(self._rule.init_scale)
        elif self._rule is not None:
            self._scale = float(self._rule)
        self._growth_tracker = 0
        self._num_scaled = 0
        self._unscaled_by: float | None = None
        self._last_unscaled_by = 1.0

    @property
    def scale(self) -> float | None:
        """The scale of the losses of this step, or None where none is built in."""
        return self._scale

    def scaled(self, loss: Tensor) -> Tensor:
        """What backward begins from; a product in fp32 where `loss` has no dimensions, as in torch."""
        if self._scale is None:
            return loss
        self._num_scaled += 1
        return loss * torch.tensor(self._scale, dtype=torch.float32, device=loss.device)

    @property
    def inverse(self) -> float:
        """The factor that takes the scale out of this step's gradients."""
        if self._scale is not None:
            return _inverse(self._scale)
        return 1.0 if self._unscaled_by is None else self._unscaled_by

    @property
    def expected_inverse(self) -> float:
        """What `inverse` will most likely be when the step is decided, as seen from its backward."""
        return _inverse(self._scale) if self._scale is not None else self._last_unscaled_by

    def unscale(self, norm: float, found_inf: Tensor, inverse: Tensor) -> None:
        """A `GradScaler` unscales: note its factor, and tell it whether `norm`, of all gradients, is finite.

        Raises: RuntimeError where a scale is built in, and where updates begin in backward for good.
        """
        if self._updates_in_backward:
            raise RuntimeError(
                'a GradScaler unscales gradients that update="backward" has used already, with its scale in them; '
                'build the engine anew with update="next_forward" or "speculative"'
            )
        if self._scale is not None:
            raise RuntimeError(
                f"a GradScaler unscales gradients whose loss the engine has scaled already (loss_scale={self._rule!r})"
                "; drop the GradScaler, or build the engine with loss_scale=None"
            )
        if not math.isfinite(norm):
            found_inf.fill_(1.0)
        self._unscaled_by = self._last_unscaled_by = float(inverse)

    def check(self, num_backwards: int) -> None:
        """Raises: RuntimeError if a backward of this step was made from a loss that was not scaled."""
        if self._scale is not None and self._num_scaled != num_backwards:
            raise RuntimeError(
                f"{num_backwards - self._num_scaled} of {num_backwards} backwards of this step were made by "
                f"loss.backward(), which knows nothing of loss_scale={self._rule!r}; drop the gradients with "
                "engine.optimizer.zero_grad() and call engine.backward(loss), or engine.train_step(...)"
            )

    def end_step(self, norm: float) -> None:
        """The step is decided; `norm` of its gradients is not finite where they overflowed."""
        rule = self._rule
        if not isinstance(rule, DynamicLossScale):
            return
        assert self._scale is not None
        if not math.isfinite(norm):
            self._scale = _float32(self._scale * rule.backoff_factor)
            self._growth_tracker = 0
            return
        self._growth_tracker += 1
        if self._growth_tracker == rule.growth_interval:
            grown = _float32(self._scale * rule.growth_factor)
            self._scale = grown if math.isfinite(grown) else self._scale
            self._growth_tracker = 0

    def forget(self) -> None:
        """The step's gradients have been used, or were dropped."""
        self._num_scaled = 0
        self._unscaled_by = None

    def state_dict(self) -> dict[str, Any]:
        """What a commit keeps, under the names of `GradScaler`; empty where nothing is built in or can change."""
        if not isinstance(self._rule, DynamicLossScale):
            return {}
        return {"scale": self._scale, "_growth_tracker": self._growth_tracker}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a kept scale; one that was kept by another setting is left out."""
        if state and isinstance(self._rule, DynamicLossScale):
            self._scale, self._growth_tracker = float(state["scale"]), int(state["_growth_tracker"])


def _inverse(scale: float) -> float:
    """1 / scale as `GradScaler` takes it: rounded to float32."""
    return _float32(1.0 / scale)


def _float32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))
