"""Reading and writing parameters where they rest: filling, private copies, state dicts, editing."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from .homes import ChunkStream, Home
from .kernels.gradient import copy_
from .kernels.master import join_, split_
from .layout import Chunk, ChunkArrays, Member, UnitLayout
from .scheduler.loop import LoopThread
from .units import ParameterInfo, Unit
from .update import AVERAGE

_WINDOW_CHUNKS = 8  # filled together: as many as keep a drive busy
WINDOW_NBYTES = 24 << 20
"""Bytes that `ParameterAccess.parts` reads and holds together."""
_EXCHANGE_NUMEL = 1 << 16  # elements that weights and average exchange at a time


@dataclass(kw_only=True, eq=False)
class HostParameter:
    """One parameter's values in host memory.

    Args:
        value: [shape] fp32 master of a trainable parameter, or the frozen parameter in its own dtype.
        grad: [shape] fp32 accumulated gradient, or None if this step has none.
        states: [shape] fp32 optimizer states by torch's names, and the average as "ema" where one is kept; states of a
            `TorchOptimizer` have its shapes and dtypes. Empty for a frozen parameter.
        step: number of updates so far.
    """

    name: str
    value: Tensor
    grad: Tensor | None = None
    states: dict[str, Tensor] = field(default_factory=dict)
    step: int = 0


@dataclass(frozen=True)
class Part:
    """Consecutive elements of one tensor of a parameter.

    Args:
        state: the name of the state that they are of, or None for the parameter's own values.
        values: flat, in the dtype that `read` gives.
    """

    info: ParameterInfo
    state: str | None
    values: Tensor


@dataclass(frozen=True, eq=False)
class _Piece:
    """Where a part lies: positions [first, last) of its tensor's flat elements (bytes where frozen), in one chunk."""

    chunk: Chunk
    member: Member
    state: str | None
    first: int
    last: int
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return self.last - self.first

    @property
    def space_nbytes(self) -> int:
        """What it takes of a window, where all begin aligned."""
        return -(-self.numel * self.dtype.itemsize // 64) * 64


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

    def fill(
        self,
        layout: UnitLayout,
        read: Callable[[ParameterInfo], Tensor],
        stored: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Give a unit its first values; states start at zero. Holds one large parameter, or a few small ones at a time.

        Args:
            read: asked once per parameter for its values: [shape], any float dtype (its own if it is no float).
            stored: told how many bytes came to rest, now and then.
        """
        flat: dict[nn.Parameter, Tensor] = {}
        for window in _windows(layout):
            members = {m.info.parameter: m for chunk in window for m, _, _ in layout.members_of(chunk)}
            flat = {p: flat[p] if p in flat else _flat(read(m.info), m.info) for p, m in members.items()}
            self._visit(
                layout, partial(_fill_chunk, layout, sources=flat), writes=("param", "frozen", "states"), chunks=window
            )
            stored(sum(layout.pieces[kind][n] for c in window for kind, n in c.pieces.items() if kind != "grad"))

    @torch.inference_mode(False)
    def parts(
        self,
        layout: UnitLayout,
        wanted: Collection[nn.Parameter] | None = None,
        *,
        states: bool = False,
        settle: bool = True,
    ) -> Iterator[Part]:
        """A unit's values as `read` gives them, but in flat parts; each tensor's come in order.

        All lie in one buffer of at most `WINDOW_NBYTES`, however large a parameter is: a part is good until the next.

        Args:
            wanted: the parameters whose values are given; None for all.
            states: give their states too.
            settle: as in `read`.
        """
        chosen = set(layout.by_parameter if wanted is None else wanted)  # a list would compare their values
        windows = list(_part_windows(layout, chosen, states))
        buffer = torch.empty(
            max((sum(p.space_nbytes for p in window) for window in windows), default=0), dtype=torch.uint8
        )
        for window in windows:
            parts, start = [], 0
            for piece in window:
                values = buffer[start : start + piece.numel * piece.dtype.itemsize].view(piece.dtype)
                parts.append((piece, values))
                start += piece.space_nbytes
            self._visit(
                layout,
                partial(_read_parts, layout, parts=parts),
                reads=("param", "frozen", "states"),
                chunks=list({id(piece.chunk): piece.chunk for piece in window}.values()),
                settle=settle,
            )
            for piece, values in parts:
                info = piece.member.info
                yield Part(info, piece.state, values.view(info.dtype) if piece.chunk.segment == "frozen" else values)

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
        settle: bool = True,
    ) -> dict[nn.Parameter, HostParameter]:
        """Full-precision values of `wanted` parameters of a unit, with states, and gradients of those in `grads`.

        With `settle=False` the caller sees to it that no update of the unit is pending or being stored.
        """
        result = {p: _empty(layout, layout.by_parameter[p], states, p in grads) for p in wanted}
        kinds = ("param", "frozen", "states", *(("grad",) if any(p in grads for p in wanted) else ()))
        chunks = [c for c in layout.chunks if any(m.info.parameter in result for m, _, _ in layout.members_of(c))]
        self._visit(
            layout,
            lambda chunk, arrays: _read_chunk(layout, chunk, arrays, result),
            reads=kinds,
            chunks=chunks,
            settle=settle,
        )
        return result

    @torch.inference_mode(False)
    def blank(self, layout: UnitLayout, parameter: nn.Parameter) -> HostParameter:
        """What `read` gives for a parameter with its states, not filled in: names, shapes and dtypes."""
        return _empty(layout, layout.by_parameter[parameter], True, False)

    def write(self, layout: UnitLayout, values: Mapping[nn.Parameter, HostParameter]) -> None:
        """Write what `read` gave back, edited. The unit is rewritten whole."""
        kinds = ["param", "frozen", "states"]
        if any(value.grad is not None for value in values.values()):
            kinds.append("grad")
        self._visit(
            layout, lambda chunk, arrays: _write_chunk(layout, chunk, arrays, values), reads=kinds, writes=kinds
        )

    def exchange_average(self, layout: UnitLayout) -> None:
        """Put a unit's moving average in the place of its masters, and them in its. Twice changes no bit."""
        kinds = ("param", "states")
        chunks = [chunk for chunk in layout.chunks if chunk.segment != "frozen"]
        self._visit(layout, lambda _, arrays: _exchange_average(arrays), reads=kinds, writes=kinds, chunks=chunks)

    def _visit(
        self,
        layout: UnitLayout,
        work: Callable[[Chunk, ChunkArrays], None],
        *,
        reads: Collection[str] = (),
        writes: Collection[str] = (),
        chunks: Sequence[Chunk] | None = None,
        settle: bool = True,
    ) -> None:
        async def visit() -> None:
            if settle:
                await self._settled([layout.unit])
            homes = self._homes[layout.unit.index]
            await self._stream.visit(layout, homes, work, reads=reads, writes=writes, label="access", chunks=chunks)

        self._loop.run(visit())


def _exchange_average(arrays: ChunkArrays) -> None:
    """Block by block: a chunk may be a unit, and another copy of it is memory that no budget counts."""
    param, whole = arrays.param, arrays.states[AVERAGE]
    assert param is not None
    for first in range(0, whole.numel(), _EXCHANGE_NUMEL):
        part = slice(first, first + _EXCHANGE_NUMEL)
        average = whole[part]
        before = torch.empty_like(average)
        if arrays.low is not None:
            join_(param[part], arrays.low[part], before)
            split_(average, param[part], arrays.low[part])
        else:
            master = param[part] if arrays.master is None else arrays.master[part]
            before.copy_(master)
            master.copy_(average)
            if arrays.master is not None:
                copy_(param[part], master)
        average.copy_(before)


def _empty(layout: UnitLayout, member: Member, states: bool, grad: bool) -> HostParameter:
    info = member.info
    frozen = member.segment == "frozen"
    fresh = {}
    if states and not frozen:
        fresh = {name: torch.empty(info.shape) for name in layout.state_names}
        fresh.update((s.name, torch.empty(s.shape, dtype=s.dtype)) for s in layout.slots_of(info.parameter))
    return HostParameter(
        name=info.name,
        value=torch.empty(info.numel, dtype=info.dtype if frozen else torch.float32).view(info.shape),
        grad=torch.empty(info.numel).view(info.shape) if grad and not frozen else None,
        states=fresh,
    )


def _slots(layout: UnitLayout, member: Member, arrays: ChunkArrays) -> dict[str, Tensor]:
    """The member's states of any shape; they lie in its segment's only chunk."""
    return {} if arrays.record is None or member.segment == "frozen" else layout.slot_views(member, arrays.record)


def _windows(layout: UnitLayout) -> Iterator[list[Chunk]]:
    """All chunks of a unit in order, a few of one segment at a time."""
    window: list[Chunk] = []
    for chunk in layout.chunks:
        if window and (len(window) == _WINDOW_CHUNKS or chunk.segment != window[0].segment):
            yield window
            window = []
        window.append(chunk)
    if window:
        yield window


def _part_windows(layout: UnitLayout, wanted: set[nn.Parameter], states: bool) -> Iterator[list[_Piece]]:
    """What is read together. A chunk is read once, unless it alone is more than a window."""
    window: list[_Piece] = []
    nbytes = 0
    for chunk in layout.chunks:
        pieces = list(_pieces(layout, chunk, wanted, states))
        together = sum(piece.space_nbytes for piece in pieces)
        for number, piece in enumerate(pieces):
            if window and nbytes + (piece.space_nbytes if number else min(together, WINDOW_NBYTES)) > WINDOW_NBYTES:
                yield window
                window, nbytes = [], 0
            window.append(piece)
            nbytes += piece.space_nbytes
    if window:
        yield window


def _pieces(layout: UnitLayout, chunk: Chunk, wanted: set[nn.Parameter], states: bool) -> Iterator[_Piece]:
    """All of a chunk, each piece a fraction of a window."""
    most_nbytes = max(64, WINDOW_NBYTES // 8 // 64 * 64)
    trainable = chunk.segment != "frozen"
    for member, begin, end in layout.members_of(chunk):
        if member.info.parameter in wanted:
            dtype = torch.float32 if trainable else torch.uint8
            step = most_nbytes // dtype.itemsize
            for first in range(begin - member.start, end - member.start, step):
                last = min(first + step, end - member.start)
                for name in (None, *(layout.state_names if states and trainable else ())):
                    yield _Piece(chunk, member, name, first, last, dtype)
    for member in layout.members if states and trainable else ():
        if member.segment == chunk.segment and member.info.parameter in wanted:
            for slot in layout.slots_of(member.info.parameter):  # a segment with slots is one chunk
                numel, step = torch.Size(slot.shape).numel(), most_nbytes // slot.dtype.itemsize
                for first in range(0, numel, step):
                    yield _Piece(chunk, member, slot.name, first, min(first + step, numel), slot.dtype)


def _flat(values: Tensor, info: ParameterInfo) -> Tensor:
    """Raises: ValueError for values that cannot be those of the parameter."""
    same_class = values.dtype == info.dtype or (
        values.dtype.is_floating_point
        and info.dtype.is_floating_point
        and values.dtype.itemsize > 1 < info.dtype.itemsize
    )
    if values.shape != info.shape or not same_class:
        raise ValueError(
            f"values for parameter {info.name!r} are {tuple(values.shape)} of {values.dtype}, expected "
            f"{tuple(info.shape)} of {info.dtype} or a dtype that converts to it"
        )
    return values.detach().reshape(-1)


def _fill_chunk(layout: UnitLayout, chunk: Chunk, arrays: ChunkArrays, sources: Mapping[nn.Parameter, Tensor]) -> None:
    for array in (arrays.param, arrays.record):
        if array is not None:
            array.zero_()
    for member, first, last in layout.members_of(chunk):
        source = sources[member.info.parameter]
        if member.segment == "frozen":  # positions are bytes of the dtype in which it rests
            dtype = member.info.dtype
            begin, end = (first - member.start) // dtype.itemsize, (last - member.start) // dtype.itemsize
            part = source[begin:end].to(dtype).view(torch.uint8)
        else:
            part = source[first - member.start : last - member.start]
        _store_value(member, chunk, arrays, first, last, part)


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
    elif member.segment == "half":
        assert arrays.master is not None
        arrays.master[part] = values
        copy_(arrays.param[part], arrays.master[part])
    else:
        arrays.param[part] = values


def _read_parts(layout: UnitLayout, chunk: Chunk, arrays: ChunkArrays, parts: Sequence[tuple[_Piece, Tensor]]) -> None:
    for piece, values in parts:
        if piece.chunk is not chunk:
            continue
        member, name = piece.member, piece.state
        at = slice(member.start + piece.first - chunk.start, member.start + piece.last - chunk.start)
        if name is None:
            _join(chunk.segment, arrays, at, values)
        elif name in arrays.states:
            values.copy_(arrays.states[name][at])
        else:
            values.copy_(_slots(layout, member, arrays)[name].reshape(-1)[piece.first : piece.last])


def _join(segment: str, arrays: ChunkArrays, part: slice, target: Tensor) -> None:
    assert arrays.param is not None
    if segment == "split":
        assert arrays.low is not None
        join_(arrays.param[part], arrays.low[part], target)
    else:
        target.copy_(arrays.param[part] if arrays.master is None else arrays.master[part])


def _read_chunk(
    layout: UnitLayout, chunk: Chunk, arrays: ChunkArrays, result: Mapping[nn.Parameter, HostParameter]
) -> None:
    for member, first, last in layout.members_of(chunk):
        host = result.get(member.info.parameter)
        if host is None:
            continue
        part = slice(first - chunk.start, last - chunk.start)
        target = _part(member, host.value.view(-1), first, last)
        _join(member.segment, arrays, part, target)
        for name, array in arrays.states.items():
            if name in host.states:
                _part(member, host.states[name].view(-1), first, last).copy_(array[part])
        for name, view in _slots(layout, member, arrays).items():
            if name in host.states:
                host.states[name].copy_(view)
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
        for name, array in arrays.states.items():
            if name in host.states:
                array[part] = _part(member, host.states[name].reshape(-1), first, last)
        for name, view in _slots(layout, member, arrays).items():
            if name in host.states:
                view.copy_(host.states[name])
        if host.grad is not None:
            assert arrays.grad is not None
            copy_(arrays.grad[part], _part(member, host.grad.reshape(-1), first, last).contiguous())
