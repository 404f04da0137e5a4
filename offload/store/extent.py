"""An extent: the pieces of one kind of one unit, which travel whole."""

from __future__ import annotations

from dataclasses import dataclass

from ..scheduler.storage import ALIGN_NBYTES
from .errors import StoreError


@dataclass(frozen=True, kw_only=True)
class Extent:
    """What the engine reads and writes under one key.

    Attributes:
        key: unique name, e.g. "blocks.3/param".
        unit: the unit whose files hold it, e.g. "blocks.3".
        kind: "param", "states", "grad", or any other word.
        piece_nbytes: length of each piece; each a positive multiple of 4096. Pieces are read and written whole.
        scratch: True for bytes that no commit covers (gradients): one slot, forgotten at a restart.
        parameters: names for error messages and the manifest.

    Raises: StoreError (a ValueError) for an empty name, no piece, or a piece that is not whole pages.
    """

    key: str
    unit: str
    kind: str
    piece_nbytes: tuple[int, ...]
    scratch: bool = False
    parameters: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.key or not self.unit or not self.kind:
            raise StoreError(f"an extent needs key, unit and kind; got {self.key!r}, {self.unit!r}, {self.kind!r}")
        object.__setattr__(self, "piece_nbytes", tuple(int(nbytes) for nbytes in self.piece_nbytes))
        object.__setattr__(self, "parameters", tuple(self.parameters))
        bad = [nbytes for nbytes in self.piece_nbytes if nbytes <= 0 or nbytes % ALIGN_NBYTES]
        if bad or not self.piece_nbytes:
            raise StoreError(
                f"extent {self.key}: every piece must be a positive multiple of {ALIGN_NBYTES} bytes, "
                f"got {bad or 'no piece at all'}; round piece sizes up to whole pages"
            )

    @property
    def nbytes(self) -> int:
        return sum(self.piece_nbytes)

    def described(self, piece: int) -> str:
        """The piece and its parameters, for error messages."""
        names = ", ".join(self.parameters[:4]) + (", ..." if len(self.parameters) > 4 else "")
        return f"piece {piece} of {len(self.piece_nbytes)} of {self.key}" + (f" (parameters {names})" if names else "")
