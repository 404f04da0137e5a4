"""`checkpoint.json`: what a checkpoint holds, with the checksums of everything else in its folder."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from xxhash import xxh3_64_hexdigest

from ..store.codec import decode
from .errors import CheckpointDamaged, CheckpointMissing

FORMAT = "offload-checkpoint"
VERSION = 1
NAME = "checkpoint.json"


@dataclass(frozen=True, kw_only=True)
class SavedFile:
    """A file of the folder: its length, and the XXH3 checksums of its header and of its tensors by name."""

    nbytes: int
    header: str
    tensors: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class SavedParameter:
    """A parameter as the run that saved it had it. `dtype` is the one that it computed in."""

    names: list[str]
    shape: list[int]
    dtype: str
    trainable: bool


@dataclass(frozen=True, kw_only=True)
class Document:
    """The body of `checkpoint.json`.

    Args:
        order: counts the saves into a run's folder; the largest is the newest, also where a run went back.
        parameters: by name, in the order of the model.
        optimizer: name and state kinds of the optimizer's spec.
        groups: the names of each parameter group's parameters.
        files: the safetensors files by name.
        left_out: checksums of frozen parameters whose values are not here, by name.
        state: counts, hyperparameters, generators, tracked objects, encoded by the store's codec.
        data: what the user gave, encoded.
    """

    order: int
    step: int
    saved_unix_s: float
    parameters: dict[str, SavedParameter]
    optimizer: dict[str, Any]
    groups: list[list[str]]
    files: dict[str, SavedFile]
    state: Any
    data: Any = None
    left_out: dict[str, str] = field(default_factory=dict)

    def run_state(self) -> dict[str, Any]:
        """What `RunState.restore` takes, without buffers."""
        return dict(decode(self.state))

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files.values())


def write(folder: Path, document: Document) -> None:
    """Write and flush the document. Raises: OSError."""
    body = {"format": FORMAT, "version": VERSION, **asdict(document)}
    text = _canonical(body)
    descriptor = os.open(folder / NAME, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(f'{{"checksum":"{xxh3_64_hexdigest(text.encode())}","body":{text}}}\n'.encode())
        file.flush()
        os.fsync(file.fileno())


def read(folder: Path) -> Document:
    """The document of a checkpoint's folder.

    Raises: CheckpointMissing if there is none; CheckpointDamaged if it is torn, altered or of another version.
    """
    path = folder / NAME
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointMissing(f"{folder} is no checkpoint: it has no {NAME}; name one that save() made") from None
    try:
        outer = json.loads(data)
        body, expected = outer["body"], outer["checksum"]
        found = xxh3_64_hexdigest(_canonical(body).encode())
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointDamaged(f"{path} is torn ({len(data)} bytes, {error}); take another checkpoint") from error
    if found != expected:
        raise CheckpointDamaged(f"{path} was altered: its checksum is {found}, it says {expected}; take another one")
    if body.pop("format", None) != FORMAT or body.pop("version", None) != VERSION:
        raise CheckpointDamaged(f"{path} is not of format {FORMAT} {VERSION}; read it with the program that wrote it")
    body["parameters"] = {name: SavedParameter(**entry) for name, entry in body["parameters"].items()}
    body["files"] = {name: SavedFile(**entry) for name, entry in body["files"].items()}
    return Document(**body)


def _canonical(body: dict[str, Any]) -> str:
    return json.dumps(body, separators=(",", ":"))
