"""What is recorded between one step and the next: losses, tokens, time, and what the lanes did meanwhile."""

from __future__ import annotations

import os
import time
from typing import Any

from torch import Tensor

from .bound import EngineBound
from .info import StepInfo
from .scheduler.chrome import ChromeTrace, TracedStep
from .scheduler.trace import Trace, Wait, busy_s, exposed_s, moved_nbytes
from .step import Decision
from .usage import ComputeRecord


class StepRecord:
    """Makes each step's `StepInfo`, and writes the trace file while there is one.

    Used by the training thread alone; lanes and calls fill `trace` and `compute` from theirs.

    Args:
        trace: what the lanes did.
        compute: the calls of units.
        bound: the lower bound of steps on a rig, or None for none.

    Attributes:
        tokens: elements of the first argument over the forwards of this step, or None where one was no integer tensor.
        took_turns: whether the micro-batches of this step share each fetch of a unit.
    """

    def __init__(self, trace: Trace, compute: ComputeRecord, bound: EngineBound | None) -> None:
        self._trace = trace
        self._compute = compute
        self._bound = bound
        self._chrome: ChromeTrace | None = None
        self._loss: Tensor | None = None
        self._since_s: float | None = None
        self.tokens: int | None = 0
        self.took_turns = False

    # -- what a step is told

    def forward_begins(self, args: tuple[Any, ...]) -> None:
        """A forward with gradients is called with `args`."""
        first = args[0] if args else None
        if self.tokens is not None and isinstance(first, Tensor) and not first.dtype.is_floating_point:
            self.tokens += first.numel()
        else:
            self.tokens = None
        if self._since_s is None:
            self._since_s = time.perf_counter()

    def note_loss(self, loss: Tensor) -> None:
        """The loss of one backward; where it is no single number, there is nothing to report."""
        if loss.numel() == 1:
            value = loss.detach().reshape(())
            self._loss = value if self._loss is None else self._loss + value

    def loss(self) -> float | None:
        """The sum of the losses noted in this step, or None. Blocks until the device has computed them."""
        return None if self._loss is None else float(self._loss)

    def forget_accumulation(self) -> None:
        """The step's gradients have been used, or were dropped."""
        self._loss = None
        self.tokens = 0

    def forget_evaluation(self) -> None:
        """Evaluation belongs to no step: neither its time nor its record, which would grow for as long as it lasts."""
        self._since_s = None
        self._compute.forget()
        self._trace.forget_fetches()

    # -- what it reports

    def end_step(
        self,
        step: int,
        loss: float | None,
        tokens: int | None,
        decision: Decision,
        lr: float,
        waited_from_s: float,
        until_s: float,
    ) -> StepInfo:
        """The report of the step that ends now. Blocks until the step's compute has run.

        Args:
            waited_from_s: since when compute has stood still for the step.
            until_s: operations that started later belong to the next step.
        """
        now_s = time.perf_counter()
        self._trace.add_wait(Wait(waited_from_s, now_s, "step"))
        self._compute.settle()
        spans, waits = self._trace.drain(until_s)
        since_s = self._since_s if self._since_s is not None else now_s
        self._since_s = now_s
        bound_s = None if self._bound is None else self._bound.of(spans, self.took_turns).bound_s
        if self._chrome is not None:
            self._chrome.add(
                TracedStep(step=step, start_s=since_s, end_s=now_s, spans=spans, waits=waits, bound_s=bound_s)
            )
        return StepInfo(
            step=step,
            loss=loss,
            grad_norm=decision.grad_norm,
            lr=lr,
            skipped=decision.skipped,
            seconds=now_s - since_s,
            tokens=tokens,
            nbytes=moved_nbytes(spans),
            busy_s=busy_s(spans),
            exposed_s=exposed_s(spans, waits),
            bound_s=bound_s,
        )

    def write_to(self, path: str | os.PathLike[str] | None) -> None:
        """Every step from here on goes to a trace file at `path`; None ends it. Raises: OSError, for the path."""
        before, self._chrome = self._chrome, None
        if before is not None:
            before.close()
        if path is not None:
            self._chrome = ChromeTrace(path)
