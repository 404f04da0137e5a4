"""Where each byte of a unit lies: the same in every home, so that a placement cannot change a bit.

A unit's trainable elements form two segments. *split*: bf16 parameters, whose fp32 master is the pair (param, low).
*whole*: fp32 parameters, which are their own master. Frozen parameters lie apart, because steps never rewrite them.
Four ranges per unit:

    param   [ split, bf16 | whole, fp32 ]
    frozen  [ frozen parameters in their own dtypes ]
    states  one record per chunk: [ low int16 (split only) | one fp32 array per state kind of the optimizer ]
    grad    [ split | whole ], bf16 or fp32

Invariant: every parameter starts on a multiple of 64 bytes in each range, because vectorised loops round differently on
unaligned data. Invariant: chunks and records start and end on pages, because direct I/O asks for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .scheduler.pool import page_ceil
from .units import ParameterInfo, Unit

KINDS = ("param", "frozen", "states", "grad")
CHUNK_NUMEL = 1 << 19
_ALIGN_NUMEL = 32  # 64 bytes of bf16
_PAGE_NUMEL = 2048  # a page of bf16
_FROZEN_PIECE_NBYTES = 4 << 20

Segment = Literal["split", "whole", "frozen"]


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
        state_names: the optimizer's fp32 state kinds, e.g. ("exp_avg", "exp_avg_sq").
        grad_fp32: whether bf16 parameters' gradients are kept in fp32 (several micro-batches).
        chunk_numel: elements per chunk, a multiple of 2048.
    """

    def __init__(self, unit: Unit, state_names: Sequence[str], grad_fp32: bool, chunk_numel: int = CHUNK_NUMEL) -> None:
        self.unit = unit
        self.state_names = tuple(state_names)
        self.grad_fp32 = grad_fp32
        self.grad_dtype = {"split": torch.float32 if grad_fp32 else torch.bfloat16, "whole": torch.float32}
        self.members: list[Member] = []
        self.chunks: list[Chunk] = []
        self.pieces: dict[str, list[int]] = {kind: [] for kind in KINDS}
        self._grad_segment_offset: dict[str, int] = {}
        for segment in ("split", "whole"):
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
        itemsize = 2 if segment == "split" else 4
        base = self.nbytes("param")
        self._grad_segment_offset[segment] = self.nbytes("grad")
        start = 0
        for info in self.unit.parameters:
            if _segment_of(info) == segment:
                self.members.append(Member(info, segment, start, base + start * itemsize))
                start += _round_up(info.numel, _ALIGN_NUMEL)
        numel = _round_up(start, _PAGE_NUMEL)
        for first in range(0, numel, chunk_numel):
            length = min(chunk_numel, numel - first)
            record = length * (4 * len(self.state_names) + (2 if segment == "split" else 0))
            sizes = {
                "param": length * itemsize,
                "states": page_ceil(record),
                "grad": length * self.grad_dtype[segment].itemsize,
            }
            self.chunks.append(Chunk(segment, first, length, self._add_pieces(sizes)))

    def _add_frozen(self) -> None:
        base = self.nbytes("param")
        start = 0
        for info in self.unit.parameters:
            if _segment_of(info) == "frozen":
                self.members.append(Member(info, "frozen", start, base + start))
                start += _round_up(info.numel * info.dtype.itemsize, 64)
        nbytes = page_ceil(start)
        for first in range(0, nbytes, _FROZEN_PIECE_NBYTES):
            length = min(_FROZEN_PIECE_NBYTES, nbytes - first)
            self.chunks.append(Chunk("frozen", first, length, self._add_pieces({"frozen": length})))

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
            return ChunkArrays(param=buffers.get("frozen"), low=None, states={}, grad=None)
        param, states, grad = buffers.get("param"), buffers.get("states"), buffers.get("grad")
        split = chunk.segment == "split"
        low = None
        arrays: dict[str, Tensor] = {}
        if states is not None:
            offset = 0
            if split:
                low = states[: chunk.numel * 2].view(torch.int16)
                offset = chunk.numel * 2
            for name in self.state_names:
                arrays[name] = states[offset : offset + chunk.numel * 4].view(torch.float32)
                offset += chunk.numel * 4
        return ChunkArrays(
            param=None if param is None else param.view(torch.bfloat16 if split else torch.float32),
            low=low,
            states=arrays,
            grad=None if grad is None else grad.view(self.grad_dtype[chunk.segment]),
        )

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


@dataclass(frozen=True, eq=False)
class ChunkArrays:
    """One chunk as flat arrays [numel]: param (bf16 or fp32; uint8 where frozen), low int16, fp32 states, grad."""

    param: Tensor | None
    low: Tensor | None
    states: dict[str, Tensor]
    grad: Tensor | None


def _segment_of(info: ParameterInfo) -> Segment:
    if not info.trainable:
        return "frozen"
    return "split" if info.dtype == torch.bfloat16 else "whole"


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
