"""Compares every byte of a checkpoint with what was saved."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..weights.files import TensorFile
from . import document
from .document import Document, SavedFile
from .errors import CheckpointError
from .folder import check_lengths


def verify(path: Path) -> list[str]:
    """One line for every damage of the checkpoint in `path`; none if it is whole. Reads all of it. Raises: OSError."""
    try:
        read = document.read(path)
        check_lengths(path, read)
    except CheckpointError as error:
        return [str(error)]
    return list(_damages(path, read))


def first_damage(path: Path, read: Document) -> str | None:
    """The first damage of the checkpoint, in words, or None; reads up to there. Raises: OSError."""
    return next(_damages(path, read), None)


def _damages(path: Path, read: Document) -> Iterator[str]:
    for name, saved in read.files.items():
        yield from _damages_of(path / name, saved)


def _damages_of(path: Path, saved: SavedFile) -> Iterator[str]:
    try:
        file = TensorFile(path)
    except ValueError as error:
        yield str(error)
        return
    with file:
        if file.header_checksum != saved.header:
            yield f"{path} is damaged: its header's checksum is {file.header_checksum}, {saved.header} was written"
            return
        for name, found in file.checksums():
            if found != saved.tensors[name]:
                yield f"{path} is damaged: the checksum of {name!r} is {found}, {saved.tensors[name]} was written"
