"""Why a store cannot be opened, read or committed."""

from __future__ import annotations


class StoreError(ValueError):
    """Something about the store's directories or requests that the user can mend; the message says how."""


class StoreBusy(StoreError):
    """Another engine that is alive holds the directory."""


class StoreExists(StoreError):
    """The directory holds a store that could still be resumed, or files that are not a store's."""


class StoreMissing(StoreError):
    """There is no store where one was expected."""


class NotResumable(StoreError):
    """The store never committed a step that could be continued."""


class StoreMismatch(StoreError):
    """The store belongs to another model, optimizer or dtype; the message names every difference."""


class StoreCorrupt(StoreError):
    """What lies on the drive is not what was committed."""


class ChecksumError(StoreCorrupt):
    """Bytes that were read differ from bytes that were written.

    Attributes: key, piece, path, offset, expected, found (the two checksums in hexadecimal).
    """

    def __init__(
        self, message: str, *, key: str, piece: int, path: str, offset: int, expected: str, found: str
    ) -> None:
        super().__init__(message)
        self.key = key
        self.piece = piece
        self.path = path
        self.offset = offset
        self.expected = expected
        self.found = found


class StoreClosed(RuntimeError):
    """The store was closed on purpose; nothing is wrong with it."""


class StoreBroken(RuntimeError):
    """A flush or a commit failed. The last committed step is intact; open the store again to continue from it."""
