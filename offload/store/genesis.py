"""The birth certificate of a store: what never changes after its creation, written once to every directory."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..scheduler.storage import Backend
from .codec import differences, encode
from .document import FORMAT, STORE_NAME, VERSION, publish
from .errors import StoreError, StoreMismatch
from .extent import Extent

Durability = str | int


@dataclass(frozen=True, kw_only=True)
class Genesis:
    """Identity, geometry and durability of a store. `identity` is JSON."""

    store_id: str
    identity: Any
    durability: Durability
    shares: tuple[int, ...]
    directories: tuple[str, ...]
    extents: tuple[Extent, ...]
    created_unix_s: float

    @staticmethod
    def new(
        identity: Mapping[str, Any], durability: Durability, shares: Sequence[int], directories: Sequence[Path],
        extents: Sequence[Extent],
    ) -> Genesis:  # fmt: skip
        return Genesis(
            store_id=uuid.uuid4().hex,
            identity=encode(dict(identity), "identity"),
            durability=durability,
            shares=tuple(shares),
            directories=tuple(str(directory) for directory in directories),
            extents=tuple(extents),
            created_unix_s=time.time(),
        )

    @property
    def num_slots(self) -> int:
        return 1 if self.durability == "none" else 2

    @property
    def every(self) -> int | None:
        """Steps between commits, None for no commits."""
        return commit_interval(self.durability)

    def write(self, backends: Sequence[Backend]) -> None:
        """Publish into every directory. Blocks."""
        for member, backend in enumerate(backends):
            publish(backend, STORE_NAME, self.body(member))

    def body(self, member: int) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "id": self.store_id,
            "member": member,
            "identity": self.identity,
            "durability": self.durability,
            "shares": list(self.shares),
            "directories": list(self.directories),
            "created_unix_s": self.created_unix_s,
            "extents": [_extent_body(extent) for extent in self.extents],
        }

    @staticmethod
    def of(body: Mapping[str, Any]) -> Genesis:
        return Genesis(
            store_id=body["id"],
            identity=body["identity"],
            durability=body["durability"],
            shares=tuple(body["shares"]),
            directories=tuple(body["directories"]),
            extents=tuple(_extent_of(entry) for entry in body["extents"]),
            created_unix_s=body["created_unix_s"],
        )

    def refuse_other(self, identity: Mapping[str, Any], extents: Sequence[Extent], root: Path) -> None:
        """Raises: StoreMismatch naming every difference between this store and the run that wants it."""
        lines = differences(self.identity, encode(dict(identity), "identity"))
        stored = {extent.key: _extent_body(extent) for extent in self.extents}
        given = {extent.key: _extent_body(extent) for extent in extents}
        lines += differences(stored, given, "extents")
        if lines:
            more = f"\n  ... and {len(lines) - 20} more" if len(lines) > 20 else ""
            raise StoreMismatch(
                f"{root} belongs to another run; its bytes would be misread:\n  "
                + "\n  ".join(lines[:20])
                + more
                + "\nBuild the same model, optimizer and dtype, or start anew in another directory"
            )


def commit_interval(durability: Durability) -> int | None:
    """Steps between commits: 1 for "step", N for N, None for "none". Raises: StoreError for anything else."""
    if durability == "none":
        return None
    if durability == "step":
        return 1
    if isinstance(durability, int) and not isinstance(durability, bool) and durability >= 1:
        return durability
    raise StoreError(f'durability must be "step", "none" or a number of steps >= 1, got {durability!r}')


def _extent_body(extent: Extent) -> dict[str, Any]:
    return {
        "key": extent.key,
        "unit": extent.unit,
        "kind": extent.kind,
        "piece_nbytes": list(extent.piece_nbytes),
        "scratch": extent.scratch,
        "parameters": list(extent.parameters),
    }


def _extent_of(body: Mapping[str, Any]) -> Extent:
    return Extent(
        key=body["key"],
        unit=body["unit"],
        kind=body["kind"],
        piece_nbytes=tuple(body["piece_nbytes"]),
        scratch=body["scratch"],
        parameters=tuple(body["parameters"]),
    )
