"""Where every piece lies: files, offsets and the share of each directory. A pure function of its arguments."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import quote, unquote

from .errors import StoreError
from .extent import Extent

STRIPE_NBYTES = 1 << 20  # pieces are cut between directories at multiples of this, as are checksum blocks
DATA_NAME = re.compile(r"^unit-.+\.(slot[01]|scratch)$")
_MAX_STEM = 200  # file systems allow 255 bytes in a name


@dataclass(frozen=True, slots=True)
class Segment:
    """A contiguous run of one piece in one file: `nbytes` at `offset` of the file, `piece_offset` in the piece."""

    directory: int
    offset: int
    piece_offset: int
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The files of a store.

    Attributes:
        segments: by extent key, for each piece its segments in the order of the piece's bytes.
        files: by (directory, stem, scratch) the length in bytes of one slot.
        shares: relative share of each directory, as recorded in the store.
    """

    segments: dict[str, tuple[tuple[Segment, ...], ...]]
    files: dict[tuple[int, str, bool], int]
    shares: tuple[int, ...]

    def file_names(self, num_slots: int) -> list[tuple[int, str, int]]:
        """(directory, file name, length in bytes) of all files."""
        names = []
        for (directory, stem, scratch), nbytes in self.files.items():
            for slot in range(1 if scratch else num_slots):
                names.append((directory, file_name(stem, slot, scratch), nbytes))
        return names

    def needed_nbytes(self, directory: int, num_slots: int) -> int:
        """Bytes that `directory` must hold."""
        return sum(nbytes for place, _, nbytes in self.file_names(num_slots) if place == directory)


@lru_cache(maxsize=4096)
def stem_of(unit: str) -> str:
    """File name stem of a unit: readable, free of separators, unique."""
    stem = quote(unit, safe=" ")
    if len(stem) > _MAX_STEM:
        stem = stem[: _MAX_STEM - 17] + "~" + hashlib.sha256(unit.encode()).hexdigest()[:16]
    return f"unit-{stem}"


def unit_of(name: str) -> str:
    """The unit (or its beginning, for very long names) that a data file belongs to."""
    return unquote(name.removeprefix("unit-").rsplit(".", 1)[0])


def file_name(stem: str, slot: int, scratch: bool) -> str:
    return f"{stem}.scratch" if scratch else f"{stem}.slot{slot}"


def plan_layout(extents: Sequence[Extent], shares: Sequence[int]) -> Layout:
    """Lay `extents` out over `len(shares)` directories in proportion to `shares`.

    Within a unit's file the parameters come first, then the states, then other kinds, each a contiguous range of its
    pieces: an update reads one run and writes one run. A piece of at least one stripe per directory is cut into one
    run per directory, so that all drives end together; smaller pieces go whole to the directory that is furthest
    below its share.

    Raises: StoreError for doubled keys or no extent.
    """
    if not extents:
        raise StoreError("a store needs at least one extent; nothing was placed on NVMe")
    seen: set[str] = set()
    for extent in extents:
        if extent.key in seen:
            raise StoreError(f"extent key {extent.key!r} is given twice; keys name one extent each")
        seen.add(extent.key)
    order = {"param": 0, "states": 1}
    units: dict[str, list[Extent]] = {}
    for extent in extents:
        units.setdefault(extent.unit, []).append(extent)
    splitter = _Splitter(shares)
    segments: dict[str, tuple[tuple[Segment, ...], ...]] = {}
    files: dict[tuple[int, str, bool], int] = {}
    for unit, members in units.items():
        stem = stem_of(unit)
        for extent in sorted(members, key=lambda member: order.get(member.kind, 2)):
            pieces = []
            for nbytes in extent.piece_nbytes:
                runs, piece_offset = [], 0
                for directory, run_nbytes in splitter.split(nbytes):
                    place = (directory, stem, extent.scratch)
                    offset = files.get(place, 0)
                    files[place] = offset + run_nbytes
                    runs.append(Segment(directory, offset, piece_offset, run_nbytes))
                    piece_offset += run_nbytes
                pieces.append(tuple(runs))
            segments[extent.key] = tuple(pieces)
    return Layout(segments=segments, files=files, shares=tuple(shares))


class _Splitter:
    """Deals bytes out to directories so that each stays as near its share as whole stripes allow."""

    def __init__(self, shares: Sequence[int]) -> None:
        if not shares or min(shares) < 1:
            raise StoreError(f"shares of the directories must be positive whole numbers, got {list(shares)}")
        self._shares = tuple(shares)
        self._given = [0] * len(shares)

    def split(self, nbytes: int) -> list[tuple[int, int]]:
        """(directory, bytes) in the order of the piece's bytes."""
        total = sum(self._given) + nbytes
        whole = sum(self._shares)
        wanted = [share * total / whole - given for share, given in zip(self._shares, self._given, strict=True)]
        runs = [0] * len(wanted)
        if len(wanted) > 1 and nbytes >= STRIPE_NBYTES * len(wanted):
            for directory, size in enumerate(wanted):
                room = nbytes - sum(runs)
                runs[directory] = int(min(max(size, 0), room)) // STRIPE_NBYTES * STRIPE_NBYTES
        # What is left: whole stripes go to whoever is furthest behind; the odd end of a cut piece stays at its end,
        # because a run that ends inside a checksum block anywhere else would tear that block in two.
        neediest = max(range(len(wanted)), key=lambda directory: wanted[directory] - runs[directory])
        rest = nbytes - sum(runs)
        tail = rest % STRIPE_NBYTES if any(runs) else 0
        runs[neediest] += rest - tail
        runs[max(directory for directory, run in enumerate(runs) if run)] += tail
        for directory, run in enumerate(runs):
            self._given[directory] += run
        return [(directory, run) for directory, run in enumerate(runs) if run]
