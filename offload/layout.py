"""Where each byte of a unit lies: the same in every home, so that a placement cannot change a bit.

A unit's trainable elements form segments. *split*: bf16 parameters, whose fp32 master is the pair (param, low). *half*:
16-bit parameters beside an fp32 master of their own, because fp16 is no half of an fp32 number. *whole*: fp32
parameters, which are their own master. Frozen parameters lie apart, because steps never rewrite them. Four ranges per
unit:

    param   [ split, bf16 | half, fp16 or bf16 | whole, fp32 ]
    frozen  [ frozen parameters in their own dtypes ]
    states  one record per chunk: [ low int16 (split) or master fp32 (half) | one fp32 array per state kind | slots ]
    grad    [ split | half | whole ], 16 bits or fp32

*Slots* are states of any shape and dtype, parameter by parameter. With them a segment is one chunk, because whoever
steps over whole parameters needs them whole.

Invariant: every parameter starts on a multiple of 64 bytes in each range, because vectorised loops round differently on
unaligned data. Invariant: chunks and records start and end on pages, because direct I/O asks for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .scheduler.pool import page_ceil
from .units import ParameterInfo, Unit

KINDS = ("param", "frozen", "states", "grad")
CHUNK_NUMEL = 1 << 19
_ALIGN_NUMEL = 32  # 64 bytes of bf16
_PAGE_NUMEL = 2048  # a page of bf16
_FROZEN_PIECE_NBYTES = 4 << 20

Segment = Literal["split", "half", "whole", "frozen"]
TRAINABLE_SEGMENTS: tuple[Segment, ...] = ("split", "half", "whole")
_PARAM_NBYTES = {"split": 2, "half": 2, "whole": 4}
_MASTER_NBYTES = {"split": 2, "half": 4, "whole": 0}  # in the states range


class StateSlot(NamedTuple):
    """One state of one parameter, of any shape and dtype."""

    name: str
    shape: torch.Size
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class Member:
    """A parameter's place: `start` is its first element in its segment (first byte, for frozen ones)."""

    info: ParameterInfo
    segment: Segment
    start: int
    staged_offset: int  # bytes from the start of the staged unit: the param range, then the frozen range

    @property
    def end(self) -> int:
        return self.start + self.info.numel


@dataclass(frozen=True, eq=False)
class Chunk:
    """A run of elements that streams as one. `numel` counts elements (bytes, for frozen chunks).

    `pieces` gives the chunk's piece number in each of the unit's ranges that has bytes of it.
    """

    segment: Segment
    start: int
    numel: int
    pieces: Mapping[str, int]


class UnitLayout:
    """The ranges of one unit.

    Args:
        unit: the unit.
        state_names: the fp32 state kinds of the optimizer and the engine, e.g. ("exp_avg", "exp_avg_sq").
        grad_fp32: whether 16-bit parameters' gradients are kept in fp32 (several micro-batches).
        chunk_numel: elements per chunk, a multiple of 2048.
        slots: states of any shape by trainable parameter; then masters are never split, and a segment is one chunk.

    Raises: ValueError for 16-bit parameters of both formats in one half segment.
    """

    def __init__(
        self,
        unit: Unit,
        state_names: Sequence[str],
        grad_fp32: bool,
        chunk_numel: int = CHUNK_NUMEL,
        slots: Mapping[torch.nn.Parameter, Sequence[StateSlot]] | None = None,
    ) -> None:
        self.unit = unit
        self.state_names = tuple(state_names)
        self.grad_fp32 = grad_fp32
        self._slots = slots
        half = {info.dtype for info in unit.parameters if self._segment_of(info) == "half"} or {torch.float16}
        if len(half) > 1:
            raise ValueError(f"unit {unit.name!r} has trainable parameters in both 16-bit formats; give it one of them")
        self._param_dtype = {"split": torch.bfloat16, "half": half.pop(), "whole": torch.float32}
        self.grad_dtype = dict.fromkeys(TRAINABLE_SEGMENTS, torch.float32) if grad_fp32 else dict(self._param_dtype)
        self.members: list[Member] = []
        self.chunks: list[Chunk] = []
        self.pieces: dict[str, list[int]] = {kind: [] for kind in KINDS}
        self._grad_segment_offset: dict[str, int] = {}
        self._slot_offsets: dict[torch.nn.Parameter, list[int]] = {}
        for segment in TRAINABLE_SEGMENTS:
            self._add_segment(segment, chunk_numel)
        self._add_frozen()
        self.by_parameter = {member.info.parameter: member for member in self.members}

    def nbytes(self, kind: str) -> int:
        """Bytes of the range of `kind`."""
        return sum(self.pieces[kind])

    @property
    def staged_nbytes(self) -> int:
        """Bytes of the unit on the device: its param range and its frozen range, in this order."""
        return self.nbytes("param") + self.nbytes("frozen")

    def chunk_nbytes(self, chunk: Chunk) -> int:
        """Bytes of all of the chunk's pieces."""
        return sum(self.pieces[kind][piece] for kind, piece in chunk.pieces.items())

    def _add_segment(self, segment: Segment, chunk_numel: int) -> None:
        itemsize = _PARAM_NBYTES[segment]
        base = self.nbytes("param")
        self._grad_segment_offset[segment] = self.nbytes("grad")
        start = 0
        for info in self.unit.parameters:
            if self._segment_of(info) == segment:
                self.members.append(Member(info, segment, start, base + start * itemsize))
                start += _round_up(info.numel, _ALIGN_NUMEL)
        numel = _round_up(start, _PAGE_NUMEL)
        if self._slots is not None:
            chunk_numel = max(numel, 1)
        for first in range(0, numel, chunk_numel):
            length = min(chunk_numel, numel - first)
            record = length * (4 * len(self.state_names) + _MASTER_NBYTES[segment])
            record = self._add_slots(segment, record)
            sizes = {
                "param": length * itemsize,
                "states": page_ceil(record),
                "grad": length * self.grad_dtype[segment].itemsize,
            }
            self.chunks.append(Chunk(segment, first, length, self._add_pieces(sizes)))

    def _add_slots(self, segment: Segment, record: int) -> int:
        """Place the slots of the segment's parameters behind `record` bytes. Returns the bytes with them."""
        if self._slots is None:
            return record
        for info in self.unit.parameters:
            if self._segment_of(info) == segment:
                offsets = self._slot_offsets[info.parameter] = []
                for slot in self._slots[info.parameter]:
                    record = _round_up(record, 64)
                    offsets.append(record)
                    record += slot.nbytes
        return record

    def _add_frozen(self) -> None:
        base = self.nbytes("param")
        start = 0
        for info in self.unit.parameters:
            if self._segment_of(info) == "frozen":
                self.members.append(Member(info, "frozen", start, base + start))
                start += _round_up(info.numel * info.dtype.itemsize, 64)
        nbytes = page_ceil(start)
        for first in range(0, nbytes, _FROZEN_PIECE_NBYTES):
            length = min(_FROZEN_PIECE_NBYTES, nbytes - first)
            self.chunks.append(Chunk("frozen", first, length, self._add_pieces({"frozen": length})))

    def _segment_of(self, info: ParameterInfo) -> Segment:
        if not info.trainable:
            return "frozen"
        if info.dtype == torch.bfloat16 and self._slots is None:
            return "split"
        return "half" if info.dtype.itemsize == 2 else "whole"

    def _add_pieces(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Append one piece per kind that has bytes; return the piece numbers."""
        numbers = {}
        for kind, nbytes in sizes.items():
            if nbytes:
                numbers[kind] = len(self.pieces[kind])
                self.pieces[kind].append(nbytes)
        return numbers

    def param_views(self, buffer: Tensor) -> dict[torch.nn.Parameter, Tensor]:
        """Shaped views of every parameter into a staged unit. `buffer`: uint8 [staged_nbytes]."""
        views = {}
        with torch.inference_mode(False):  # a view made inside inference mode would raise in a later backward
            for member in self.members:
                info = member.info
                nbytes = info.numel * info.dtype.itemsize
                flat = buffer[member.staged_offset : member.staged_offset + nbytes]
                views[info.parameter] = flat.view(info.dtype).view(info.shape)
        return views

    def grad_view(self, buffer: Tensor, member: Member) -> Tensor:
        """The flat gradient [numel] of a trainable member inside a grad range. `buffer`: uint8 [nbytes of grad]."""
        dtype = self.grad_dtype[member.segment]
        first = self._grad_segment_offset[member.segment] + member.start * dtype.itemsize
        return buffer[first : first + member.info.numel * dtype.itemsize].view(dtype)

    def chunk_arrays(self, chunk: Chunk, buffers: Mapping[str, Tensor]) -> ChunkArrays:
        """Typed flat arrays over one chunk's pieces. `buffers`: uint8 piece by kind, for the kinds that are at hand."""
        if chunk.segment == "frozen":
            return ChunkArrays(param=buffers.get("frozen"))
        param, states, grad = buffers.get("param"), buffers.get("states"), buffers.get("grad")
        low = master = None
        arrays: dict[str, Tensor] = {}
        if states is not None:
            offset = chunk.numel * _MASTER_NBYTES[chunk.segment]
            if chunk.segment == "split":
                low = states[:offset].view(torch.int16)
            elif chunk.segment == "half":
                master = states[:offset].view(torch.float32)
            for name in self.state_names:
                arrays[name] = states[offset : offset + chunk.numel * 4].view(torch.float32)
                offset += chunk.numel * 4
        return ChunkArrays(
            param=None if param is None else param.view(self._param_dtype[chunk.segment]),
            low=low,
            master=master,
            states=arrays,
            record=states,
            grad=None if grad is None else grad.view(self.grad_dtype[chunk.segment]),
        )

    def slots_of(self, parameter: torch.nn.Parameter) -> Sequence[StateSlot]:
        """The states of any shape that a trainable parameter has."""
        return () if self._slots is None else self._slots.get(parameter, ())

    def slot_views(self, member: Member, record: Tensor) -> dict[str, Tensor]:
        """Shaped views of a trainable member's slots by name. `record`: the states piece of its chunk."""
        views = {}
        for slot, offset in zip(
            self.slots_of(member.info.parameter), self._slot_offsets.get(member.info.parameter, ()), strict=True
        ):
            views[slot.name] = record[offset : offset + slot.nbytes].view(slot.dtype).view(slot.shape)
        return views

    def members_of(self, chunk: Chunk) -> list[tuple[Member, int, int]]:
        """(member, first, last) for each member that overlaps `chunk`; first and last are positions in its segment."""
        if chunk.segment == "frozen":
            sizes = [(m, m.start, m.start + m.info.numel * m.info.dtype.itemsize) for m in self.members]
        else:
            sizes = [(m, m.start, m.end) for m in self.members]
        stop = chunk.start + chunk.numel
        return [
            (member, max(first, chunk.start), min(last, stop))
            for member, first, last in sizes
            if member.segment == chunk.segment and first < stop and last > chunk.start
        ]


@dataclass(frozen=True, eq=False, kw_only=True)
class ChunkArrays:
    """One chunk as flat arrays [numel]: param (16 bits or fp32; uint8 where frozen), low int16 or master fp32, fp32
    states, grad. `record` is all of its states piece (uint8), in which slots lie."""

    param: Tensor | None
    low: Tensor | None = None
    master: Tensor | None = None
    states: dict[str, Tensor] = field(default_factory=dict)
    record: Tensor | None = None
    grad: Tensor | None = None


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
