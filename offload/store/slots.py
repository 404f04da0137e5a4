"""Which slot of an extent holds what: the newest bytes, the committed ones, the ones a commit is making durable."""

from __future__ import annotations

from collections.abc import Sequence

from .errors import StoreError
from .extent import Extent


class ExtentSlots:
    """The state of one extent. Touched on the event loop's thread only.

    With two slots, `committed` holds the last durable step and every write goes to the other one, so that an
    interrupted step can never damage the committed one. While `sealed`, a commit is making the other slot durable and
    no slot is writable: the sealed one is being committed and the committed one is still the only durable step.
    """

    def __init__(self, extent: Extent, num_slots: int) -> None:
        num_pieces = len(extent.piece_nbytes)
        self.extent = extent
        self.num_slots = 1 if extent.scratch else num_slots
        self.committed: int | None = None
        self.sealed = False
        self.newest: list[int | None] = [None] * num_pieces
        self.checksums: list[list[str | None]] = [[None] * num_pieces for _ in range(self.num_slots)]
        self.written_in_step: set[int] = set()
        self.dirty = False

    @property
    def target(self) -> int:
        """The slot that writes go to."""
        if self.num_slots == 1:
            return 0
        if self.sealed:
            raise RuntimeError(f"{self.extent.key} is being committed: no slot may be written")
        return 0 if self.committed is None else 1 - self.committed

    def begin_write(self, piece: int) -> int:
        """Slot for a write of `piece`. If it overwrites the newest bytes they count as gone until `end_write`."""
        slot = self.target
        if self.newest[piece] == slot:
            # A write that fails half-way leaves neither old nor new bytes: a later read must not trust them.
            self.newest[piece] = None
        self.dirty = True
        return slot

    def end_write(self, piece: int, slot: int, checksum: str | None) -> None:
        self.newest[piece] = slot
        self.checksums[slot][piece] = checksum
        self.written_in_step.add(piece)

    def source(self, piece: int) -> int:
        """Slot of the newest bytes of `piece`.

        Raises: StoreError if it was never written, or its last write failed.
        """
        slot = self.newest[piece]
        if slot is None:
            raise StoreError(
                f"{self.extent.described(piece)} has no valid bytes: it was never written, or its last write failed; "
                f"write it before reading it"
            )
        return slot

    def missing_pieces(self) -> list[int]:
        """Pieces that the running step should have written and did not; empty if it wrote all or none."""
        missing = {piece for piece in range(len(self.newest)) if self.dirty and self.newest[piece] != self.target}
        if self.written_in_step:
            missing |= set(range(len(self.newest))) - self.written_in_step
        return sorted(missing)

    def seal(self) -> int:
        """Begin to commit what was written; returns its slot. Writes must wait for `unseal`."""
        slot = self.target
        self.sealed = True
        self.dirty = False
        return slot

    def unseal(self, committed: int | None = None) -> None:
        """End a commit: with a slot it is the committed one now, without one the commit failed."""
        self.sealed = False
        if committed is not None:
            self.committed = committed

    def revert(self) -> None:
        """Forget what was written since the last commit: the committed bytes are the newest again.

        Raises: StoreError if nothing was committed, or a commit is under way. No write may be in flight.
        """
        if self.num_slots == 1 or self.committed is None or self.sealed:
            raise StoreError(f"{self.extent.key} has no committed step to go back to, or is being committed")
        self.newest = [self.committed] * len(self.newest)
        self.written_in_step.clear()
        self.dirty = False

    def restore(self, slot: int, checksums: Sequence[str | None]) -> None:
        """Take over what a manifest says: `slot` holds the committed bytes with these checksums."""
        self.committed = slot
        self.newest = [slot] * len(self.newest)
        self.checksums[slot] = list(checksums)
