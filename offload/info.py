"""What a step and a run report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class StepInfo:
    """One optimizer step.

    Args:
        step: number of this step, from 1; skipped steps count.
        loss: sum of the losses given to `engine.backward` in this step (as gradients are summed), or None when
            `loss.backward()` was used.
        grad_norm: global gradient norm before clipping (2-norm).
        lr: learning rate of the first parameter group at this step.
        skipped: whether the loss or a gradient was not finite; nothing was changed then.
        seconds: from the end of the last step (or, after an evaluation, the first forward) to the end of this one.
        tokens: elements of the first argument over the forwards with gradients, or None where it is no integer tensor.
        nbytes: bytes moved, by lane: h2d and d2h cross the link, read and write NVMe, cpu is what host kernels touched.
        busy_s: seconds in which each lane worked, by lane.
        exposed_s: seconds in which compute waited, by the lane it waited for.
        bound_s: the step's lower bound on `OffloadConfig(rig=...)` for this placement, or None without a rig.
    """

    step: int
    loss: float | None
    grad_norm: float
    lr: float
    skipped: bool
    seconds: float
    tokens: int | None
    nbytes: Mapping[str, int]
    busy_s: Mapping[str, float]
    exposed_s: Mapping[str, float]
    bound_s: float | None = None

    @property
    def bound_ratio(self) -> float | None:
        """seconds / bound_s: how far the step is from the slowest resource's own time; None without a rig."""
        return None if self.bound_s is None else self.seconds / self.bound_s


@dataclass(frozen=True, kw_only=True)
class MemoryReport:
    """Bytes under the budgets now and at their peak, and what lies outside of them.

    Args:
        boundaries_peak_nbytes: inputs of unit calls kept for backward, at their most.
        activations_peak_nbytes: what autograd saved inside unit calls and was kept for backward, at its most
            (`OffloadConfig(activation_memory=...)`).
        temporaries_nbytes: what autograd saved inside the largest unit call.
        private_nbytes: copies of parameters read outside of the call of their unit.
    """

    host_budget_nbytes: int
    host_used_nbytes: int
    host_peak_nbytes: int
    device_budget_nbytes: int
    device_used_nbytes: int
    device_peak_nbytes: int
    boundaries_peak_nbytes: int
    activations_peak_nbytes: int
    temporaries_nbytes: int
    private_nbytes: int
