"""Reading and writing parameters where they rest: filling, private copies, state dicts, editing."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .homes import ChunkStream, Home
from .kernels.gradient import copy_
from .kernels.master import join_, split_
from .layout import Chunk, ChunkArrays, Member, UnitLayout
from .scheduler.loop import LoopThread
from .units import Unit


@dataclass(kw_only=True, eq=False)
class HostParameter:
    """One parameter's values in host memory.

    Args:
        value: [shape] fp32 master of a trainable parameter, or the frozen parameter in its own dtype.
        grad: [shape] fp32 accumulated gradient, or None if this step has none.
        states: [shape] fp32 optimizer states by torch's names; empty for a frozen parameter.
        step: number of updates so far.
    """

    name: str
    value: Tensor
    grad: Tensor | None = None
    states: dict[str, Tensor] = field(default_factory=dict)
    step: int = 0


class ParameterAccess:
    """Streams whole parameters between their homes and ordinary tensors. Blocks the calling thread.

    What it returns outlives a caller's inference mode, so it is made outside of it.

    The caller sees to it that nobody else uses the units meanwhile.

    Args:
        settled: returns when no update of the given units is pending or being stored.
    """

    def __init__(
        self,
        layouts: Sequence[UnitLayout],
        homes: Sequence[dict[str, Home]],
        stream: ChunkStream,
        loop: LoopThread,
        device: torch.device,
        settled: Callable[[Sequence[Unit]], Awaitable[None]],
    ) -> None:
        self._layouts = layouts
        self._homes = homes
        self._stream = stream
        self._loop = loop
        self._device = device
        self._settled = settled
        self._layout_of = {p: layout for layout in layouts for p in layout.by_parameter}

    def fill(self, layout: UnitLayout) -> None:
        """Take a unit's values over from its parameters' own tensors; states start at zero."""
        sources = {}
        for member in layout.members:
            flat = member.info.parameter.detach().reshape(-1).cpu()
            sources[member.info.parameter] = flat.to(member.info.dtype) if member.segment == "frozen" else flat
        self._visit(
            layout,
            lambda chunk, arrays: _fill_chunk(layout, chunk, arrays, sources),
            writes=("param", "frozen", "states"),
        )

    @torch.inference_mode(False)
    def read_compute(self, parameter: nn.Parameter) -> Tensor:
        """A fresh tensor on the compute device, in the compute dtype, of one parameter's values."""
        layout = self._layout_of[parameter]
        member = layout.by_parameter[parameter]
        value = torch.empty(member.info.numel, dtype=member.info.dtype)

        def take(chunk: Chunk, arrays: ChunkArrays) -> None:
            for other, first, last in layout.members_of(chunk):
                if other is member and arrays.param is not None:
                    part = arrays.param[first - chunk.start : last - chunk.start]
                    if member.segment == "frozen":
                        value.view(torch.uint8)[first - member.start : last - member.start] = part
                    else:
                        value[first - member.start : last - member.start] = part

        chunks = [c for c in layout.chunks if any(m is member for m, _, _ in layout.members_of(c))]
        self._visit(layout, take, reads=("param", "frozen"), chunks=chunks)
        return value.view(member.info.shape).to(self._device)

    @torch.inference_mode(False)
    def read(
        self,
        layout: UnitLayout,
        wanted: Collection[nn.Parameter],
        *,
        states: bool,
        grads: Collection[nn.Parameter] = (),
    ) -> dict[nn.Parameter, HostParameter]:
        """Full-precision values of `wanted` parameters of a unit, with states, and gradients of those in `grads`."""
        result = {p: _empty(layout, layout.by_parameter[p], states, p in grads) for p in wanted}
        kinds = ("param", "frozen", "states", *(("grad",) if any(p in grads for p in wanted) else ()))
        chunks = [c for c in layout.chunks if any(m.info.parameter in result for m, _, _ in layout.members_of(c))]
        self._visit(
            layout, lambda chunk, arrays: _read_chunk(layout, chunk, arrays, result), reads=kinds, chunks=chunks
        )
        return result

    def write(self, layout: UnitLayout, values: Mapping[nn.Parameter, HostParameter]) -> None:
        """Write what `read` gave back, edited. The unit is rewritten whole."""
        kinds = ["param", "frozen", "states"]
        if any(value.grad is not None for value in values.values()):
            kinds.append("grad")
        self._visit(
            layout, lambda chunk, arrays: _write_chunk(layout, chunk, arrays, values), reads=kinds, writes=kinds
        )

    def _visit(
        self,
        layout: UnitLayout,
        work: Callable[[Chunk, ChunkArrays], None],
        *,
        reads: Collection[str] = (),
        writes: Collection[str] = (),
        chunks: Sequence[Chunk] | None = None,
    ) -> None:
        async def visit() -> None:
            await self._settled([layout.unit])
            homes = self._homes[layout.unit.index]
            await self._stream.visit(layout, homes, work, reads=reads, writes=writes, label="access", chunks=chunks)

        self._loop.run(visit())


def _empty(layout: UnitLayout, member: Member, states: bool, grad: bool) -> HostParameter:
    info = member.info
    frozen = member.segment == "frozen"
    fresh = {name: torch.empty(info.numel) for name in layout.state_names} if states and not frozen else {}
    return HostParameter(
        name=info.name,
        value=torch.empty(info.numel, dtype=info.dtype if frozen else torch.float32).view(info.shape),
        grad=torch.empty(info.numel).view(info.shape) if grad and not frozen else None,
        states={name: state.view(info.shape) for name, state in fresh.items()},
    )


def _fill_chunk(layout: UnitLayout, chunk: Chunk, arrays: ChunkArrays, sources: Mapping[nn.Parameter, Tensor]) -> None:
    for array in (arrays.param, arrays.low, *arrays.states.values()):
        if array is not None:
            array.zero_()
    for member, first, last in layout.members_of(chunk):
        source = sources[member.info.parameter]
        _store_value(member, chunk, arrays, first, last, _part(member, source, first, last))


def _part(member: Member, flat: Tensor, first: int, last: int) -> Tensor:
    """Positions [first, last) of a member's segment, inside the parameter's own flat values (bytes where frozen)."""
    if member.segment == "frozen":
        flat = flat.view(torch.uint8)
    return flat[first - member.start : last - member.start]


def _store_value(member: Member, chunk: Chunk, arrays: ChunkArrays, first: int, last: int, values: Tensor) -> None:
    part = slice(first - chunk.start, last - chunk.start)
    assert arrays.param is not None
    if member.segment == "split":
        assert arrays.low is not None
        split_(values.float().contiguous(), arrays.param[part], arrays.low[part])
    else:
        arrays.param[part] = values


def _read_chunk(
    layout: UnitLayout, chunk: Chunk, arrays: ChunkArrays, result: Mapping[nn.Parameter, HostParameter]
) -> None:
    assert arrays.param is not None
    for member, first, last in layout.members_of(chunk):
        host = result.get(member.info.parameter)
        if host is None:
            continue
        part = slice(first - chunk.start, last - chunk.start)
        target = _part(member, host.value.view(-1), first, last)
        if member.segment == "split":
            assert arrays.low is not None
            join_(arrays.param[part], arrays.low[part], target)
        else:
            target.copy_(arrays.param[part])
        for name, state in host.states.items():
            _part(member, state.view(-1), first, last).copy_(arrays.states[name][part])
        if host.grad is not None:
            assert arrays.grad is not None
            copy_(_part(member, host.grad.view(-1), first, last), arrays.grad[part])


def _write_chunk(
    layout: UnitLayout, chunk: Chunk, arrays: ChunkArrays, values: Mapping[nn.Parameter, HostParameter]
) -> None:
    for member, first, last in layout.members_of(chunk):
        host = values.get(member.info.parameter)
        if host is None:
            continue
        part = slice(first - chunk.start, last - chunk.start)
        _store_value(member, chunk, arrays, first, last, _part(member, host.value.reshape(-1), first, last))
        for name, state in host.states.items():
            arrays.states[name][part] = _part(member, state.reshape(-1), first, last)
        if host.grad is not None:
            assert arrays.grad is not None
            copy_(arrays.grad[part], _part(member, host.grad.reshape(-1), first, last).contiguous())
