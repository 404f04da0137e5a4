"""Many pieces of one extent, to be read at once: checked and located as arrays instead of one by one."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..scheduler.storage import address_of, view_of
from .errors import StoreError
from .extent import Extent
from .layout import Segment
from .slots import ExtentSlots

SMALL_NBYTES = 256 << 10  # up to here a piece is better read together with others than in a thread of its own


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PieceTable:
    """Where the pieces of an extent lie, int64 [num_pieces] each.

    `directory` is -1 for a piece that is not read in a batch: a large one, or one that lies in several directories.
    """

    directory: np.ndarray
    offset: np.ndarray

    @classmethod
    def of(cls, segments: Sequence[Sequence[Segment]]) -> PieceTable:
        directories = [
            runs[0].directory if len(runs) == 1 and runs[0].nbytes <= SMALL_NBYTES else -1 for runs in segments
        ]
        return cls(directory=np.array(directories), offset=np.array([runs[0].offset for runs in segments]))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Gather:
    """Pieces of one extent with the slots to read them from and the buffers to read them to.

    `address` and `nbytes` (int64 [n]) are those of `buffers`, which this keeps alive.
    """

    extent: Extent
    pieces: Sequence[int]
    slots: list[int]
    buffers: Sequence[Tensor]
    address: np.ndarray
    nbytes: np.ndarray


def gather(slots: ExtentSlots, sizes: np.ndarray, pieces: Sequence[int], buffers: Sequence[Tensor]) -> Gather:
    """Check what a caller wants to read of one extent, whose pieces have `sizes` (int64 [num_pieces]).

    Raises: StoreError for a piece that is not there, a buffer of another length or a piece without valid bytes;
        TypeError, ValueError or RuntimeError for a buffer that is not plain host memory.
    """
    address, nbytes = _memory(buffers)
    wanted = np.fromiter(map(operator.index, pieces), dtype=np.int64, count=len(pieces))
    inside = (wanted >= 0) & (wanted < len(sizes))
    wrong = np.flatnonzero(~inside | (sizes[np.where(inside, wanted, 0)] != nbytes))
    if len(wrong):
        raise wrong_buffer(slots.extent, pieces[wrong[0]], int(nbytes[wrong[0]]))
    newest = slots.newest
    chosen = [newest[piece] for piece in pieces]
    if None in chosen:
        slots.source(pieces[chosen.index(None)])  # raises, and says why
    return Gather(
        extent=slots.extent, pieces=pieces, slots=chosen,  # type: ignore[arg-type]
        buffers=buffers, address=address, nbytes=nbytes,
    )  # fmt: skip


def wrong_buffer(extent: Extent, piece: int, nbytes: int) -> StoreError:
    """The error for a piece that is not there, or whose buffer has another length."""
    sizes = extent.piece_nbytes
    wanted = f"{sizes[piece]} bytes" if 0 <= piece < len(sizes) else f"0..{len(sizes) - 1}"
    return StoreError(f"{extent.key}: piece {piece} with a buffer of {nbytes} bytes, expected {wanted}")


def _memory(buffers: Sequence[Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Addresses and lengths of the buffers; raises for what is not plain host memory, as `view_of` does."""
    plain = all(
        type(buffer) is Tensor
        and buffer.dtype is torch.uint8
        and buffer.is_cpu
        and buffer.layout is torch.strided
        and buffer.is_contiguous()
        for buffer in buffers
    )
    if plain:
        address, nbytes = [buffer.data_ptr() for buffer in buffers], [buffer.nbytes for buffer in buffers]
    else:
        views = [view_of(buffer) for buffer in buffers]
        address, nbytes = [address_of(view) for view in views], [len(view) for view in views]
    return np.array(address, dtype=np.int64), np.array(nbytes, dtype=np.int64)
