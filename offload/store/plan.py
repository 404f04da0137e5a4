"""What a read of many pieces asks of each drive: the gathers of several extents as one set of arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ..scheduler.storage import OffloadIOError, ReadBatch, StorageFile
from .extent import Extent
from .gather import Gather, PieceTable

BATCH_PIECES = 1024
BATCH_NBYTES = 32 << 20  # so that a batch of larger pieces does not hold up what is more urgent


class ReadPlan:
    """All pieces of `gathers`, one array entry each.

    Attributes:
        owner, index: int64 [n], which gather a piece is of and its place in it.
        directory: int64 [n], -1 for a piece that is not read in a batch.
    """

    def __init__(
        self, gathers: Sequence[Gather], tables: Sequence[PieceTable],
        file_of: Callable[[Extent, int, int], StorageFile],
    ) -> None:  # fmt: skip
        self._gathers = gathers
        self._files: list[StorageFile] = []
        lengths = [len(member.pieces) for member in gathers]
        self.owner = np.repeat(np.arange(len(gathers)), lengths)
        self.index = _joined([np.arange(length) for length in lengths])
        pieces = [np.array(member.pieces, dtype=np.int64) for member in gathers]
        self.directory = _joined([table.directory[at] for table, at in zip(tables, pieces, strict=True)])
        self._offset = _joined([table.offset[at] for table, at in zip(tables, pieces, strict=True)])
        self._address = _joined([member.address for member in gathers])
        self._nbytes = _joined([member.nbytes for member in gathers])
        self._file = np.full(len(self.owner), -1)
        slots = _joined([np.array(member.slots, dtype=np.int64) for member in gathers])
        for number, member in enumerate(gathers):
            mine = (self.owner == number) & (self.directory >= 0)
            for directory, slot in np.unique(np.stack([self.directory[mine], slots[mine]]), axis=1).T.tolist():
                self._file[mine & (self.directory == directory) & (slots == slot)] = len(self._files)
                self._files.append(file_of(member.extent, directory, slot))

    def batches(self, num_directories: int) -> Iterator[tuple[int, np.ndarray]]:
        """(directory, entries) of every batch; within the bounds above, in the order given."""
        for directory in range(num_directories):
            mine = np.flatnonzero(self.directory == directory)
            if not len(mine):
                continue
            step = max(1, min(BATCH_PIECES, BATCH_NBYTES // int(self._nbytes[mine].max())))
            for start in range(0, len(mine), step):
                yield directory, mine[start : start + step]

    def batch(self, chosen: np.ndarray) -> ReadBatch:
        return ReadBatch(
            files=self._files, file=self._file[chosen], offset=self._offset[chosen], address=self._address[chosen],
            nbytes=self._nbytes[chosen],
        )  # fmt: skip

    def extent_of(self, entry: int) -> Extent:
        return self._gathers[self.owner[entry]].extent

    def piece_of(self, entry: int) -> int:
        return self._gathers[self.owner[entry]].pieces[self.index[entry]]

    def described(self, chosen: np.ndarray, error: OSError) -> str:
        """The piece of a batch that `error` is about; all of them if it does not say."""
        if isinstance(error, OffloadIOError):
            for entry in chosen.tolist():
                start = int(self._offset[entry])
                here = self._files[self._file[entry]].path == error.path
                if here and start <= error.offset < start + int(self._nbytes[entry]):
                    return self.extent_of(entry).described(self.piece_of(entry))
        return f"{len(chosen)} pieces from {self.extent_of(chosen[0]).described(self.piece_of(chosen[0]))} on"


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
