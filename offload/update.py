"""The optimizer's pass over one unit: chunk by chunk, in ranges of equal hyperparameters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from .homes import ChunkStream, Home
from .kernels.average import average_
from .kernels.gradient import copy_
from .layout import Chunk, ChunkArrays, UnitLayout
from .optimizers import OptimizerSpec, Scalars, WholeParameterSpec
from .scheduler.storage import NEEDED_SOON

AVERAGE = "ema"
"""The state kind of the moving average of the weights."""


class Range(NamedTuple):
    """Elements [first, last) of a segment that one kernel call updates with the same scalars."""

    first: int
    last: int
    scalars: Scalars


class UnitUpdate:
    """One unit's update in one step. Everything it depends on is fixed when it is made.

    Args:
        scalars: for each parameter with a gradient; a parameter that is missing here is untouched.
        grad_scale: the deferred factor on all gradients (clipping, and the inverse of a loss scale).
        average_weight: of the new masters in the moving average (the state "ema"), which takes in all of the unit's
            parameters; None where no average is kept.
    """

    def __init__(
        self,
        spec: OptimizerSpec,
        layout: UnitLayout,
        scalars: Mapping[nn.Parameter, Scalars],
        grad_scale: float,
        average_weight: float | None = None,
    ) -> None:
        self._spec = spec
        self._layout = layout
        self._scalars = scalars
        self._grad_scale = grad_scale
        self._average_weight = average_weight
        self._chunks = [chunk for chunk in layout.chunks if chunk.segment != "frozen"]

    @property
    def changes_parameters(self) -> bool:
        """Whether more than the moving average changes."""
        return bool(self._scalars)

    @property
    def parameters(self) -> Collection[nn.Parameter]:
        """Those with a gradient."""
        return self._scalars.keys()

    @property
    def num_chunks(self) -> int:
        return len(self._chunks)

    async def run(
        self,
        stream: ChunkStream,
        homes: dict[str, Home],
        *,
        held: Mapping[str, Tensor] | None = None,
        present: bool = False,
        computed: Callable[[], None] | None = None,
        needed: int = NEEDED_SOON,
    ) -> None:
        """Read states, update, write states and the new parameters; see `ChunkStream.visit` for the arguments.

        A unit is rewritten whole, also where only some of its parameters have a gradient, so that a range in the
        store is always of one step.
        """
        await stream.visit(
            self._layout,
            homes,
            self._work,
            reads=("param", "states", "grad") if self._scalars else ("param", "states"),
            writes=("param", "states"),
            label="update",
            chunks=self._chunks,
            held=held,
            present=present,
            computed=computed,
            needed=needed,
            may_use_device=True,
        )

    def _work(self, chunk: Chunk, arrays: ChunkArrays) -> None:
        assert arrays.param is not None
        if self._scalars and isinstance(self._spec, WholeParameterSpec):
            self._step_parameters(self._spec, chunk, arrays)
        elif self._scalars:
            self._step_ranges(chunk, arrays)
        if self._average_weight is not None:
            param, low = (arrays.param, arrays.low) if arrays.master is None else (arrays.master, None)
            average_(arrays.states[AVERAGE], param, low, self._average_weight)

    def _step_ranges(self, chunk: Chunk, arrays: ChunkArrays) -> None:
        assert arrays.param is not None and arrays.grad is not None
        for first, last, scalars in self.ranges(chunk):
            part = slice(first - chunk.start, last - chunk.start)
            param = arrays.param[part]
            master = None if arrays.master is None else arrays.master[part]
            self._spec.update(
                param if master is None else master,
                None if arrays.low is None else arrays.low[part],
                {name: state[part] for name, state in arrays.states.items()},
                arrays.grad[part],
                scalars,
                self._grad_scale,
            )
            if master is not None:
                copy_(param, master)

    def _step_parameters(self, spec: WholeParameterSpec, chunk: Chunk, arrays: ChunkArrays) -> None:
        """The layout has given each segment one chunk, so every parameter is here whole."""
        assert arrays.param is not None and arrays.grad is not None
        for member, first, last in self._layout.members_of(chunk):
            scalars = self._scalars.get(member.info.parameter)
            if scalars is None:
                continue
            part = slice(first - chunk.start, last - chunk.start)
            param = arrays.param[part]
            master = param if arrays.master is None else arrays.master[part]
            states = {} if arrays.record is None else self._layout.slot_views(member, arrays.record)
            spec.step_parameter(member.info, master, states, arrays.grad[part], scalars, self._grad_scale)
            if arrays.master is not None:
                copy_(param, master)

    def ranges(self, chunk: Chunk) -> list[Range]:
        """The ranges inside `chunk`; neighbours with equal scalars are one."""
        ranges: list[Range] = []
        for member, first, last in self._layout.members_of(chunk):
            scalars = self._scalars.get(member.info.parameter)
            if scalars is None or first == last:
                continue
            if ranges and ranges[-1].last == first and ranges[-1].scalars == scalars:
                ranges[-1] = Range(ranges[-1].first, last, scalars)
            else:
                ranges.append(Range(first, last, scalars))
        return ranges
