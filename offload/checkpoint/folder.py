"""A run's folder: which checkpoints are in it, how one appears in it whole, and how old ones leave it."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..weights.files import sync
from . import document
from .document import Document
from .errors import CheckpointDamaged, CheckpointError, CheckpointMissing

log = logging.getLogger(__name__)

_NAME = re.compile(r"step-\d{6,}")
_SAVING, _REPLACED, _REMOVING = ".saving", ".replaced", ".removing"


@dataclass(frozen=True)
class Found:
    """A checkpoint of a run's folder whose document can be read and whose files have the right lengths."""

    path: Path
    document: Document


class RunFolder:
    """Where a run's checkpoints lie, each in `step-NNNNNN`.

    One is written under another name and renamed when all of it is on the drive, so what has its name is whole.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Make the folder, and keep every other process from saving into it; what a dead one left is cleared.

        Raises: CheckpointError if another process is saving into it; OSError.
        """
        if self.root.exists() and not self.root.is_dir():
            raise CheckpointError(f"{self.root} is a file; name a folder for checkpoints")
        _make_durably(self.root)
        descriptor = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CheckpointError(
                    f"another run is saving into {self.root}; give every run a folder of its own"
                ) from None
            self._clear()
            yield
        finally:
            os.close(descriptor)

    def _clear(self) -> None:
        """Finish what a process that died had begun. Invariant: what was replaced goes only when its heir is there."""
        for path in sorted(self.root.iterdir()):
            step = self.root / path.stem.removeprefix(".")
            if not path.name.startswith(".step-") or not _NAME.fullmatch(step.name):
                continue
            if path.suffix == _REPLACED and not step.exists():
                path.rename(step)
            elif path.suffix in (_SAVING, _REPLACED, _REMOVING):
                shutil.rmtree(path)

    def begin(self, step: int) -> Path:
        """A new folder in which to write the checkpoint of `step`; it is none yet. Raises: OSError."""
        path = self._hidden(self.root / f"step-{step:06d}", _SAVING)
        path.mkdir(mode=0o700)
        return path

    def target(self, step: int) -> Path:
        return self.root / f"step-{step:06d}"

    def publish(self, written: Path, step: int) -> Path:
        """Give a folder whose files are all flushed its name, durably; one of the same step is replaced.

        At every moment one of the two is there whole, maybe under its hidden name. Raises: OSError.
        """
        target = self.target(step)
        sync(written)
        old = self._hidden(target, _REPLACED)
        if target.exists():
            target.rename(old)
        written.rename(target)
        sync(self.root)
        if old.exists():
            shutil.rmtree(old)
        return target

    def discard(self, written: Path) -> None:
        """Remove what was begun and not published."""
        shutil.rmtree(written, ignore_errors=True)

    def found(self) -> list[Found]:
        """The checkpoints that look whole, oldest save first; nothing else in the folder is looked at."""
        found = []
        for path in self.names():
            try:
                read = document.read(path)
                check_lengths(path, read)
            except CheckpointError as error:
                log.warning("%s", error)
                continue
            found.append(Found(path, read))
        return sorted(found, key=lambda one: one.document.order)

    def names(self) -> list[Path]:
        """Everything that has a checkpoint's name, or has lost it to an heir that never came (`publish`)."""
        if not self.root.is_dir():
            return []
        names = {path.name: path for path in self.root.iterdir() if path.is_dir()}
        replaced = [path for name, path in names.items() if path.suffix == _REPLACED and path.stem[1:] not in names]
        return sorted([*replaced, *(path for name, path in names.items() if _NAME.fullmatch(name))])

    def prune(self, keep: int, newest: Path) -> None:
        """Remove all but the `keep` last saved checkpoints; never `newest`, none of a later step than it, because that
        may be of another run, and nothing that does not look whole.

        A folder that is being removed has lost its name first, so that half of one is never taken for a checkpoint.
        """
        found = self.found()
        step = next((one.document.step for one in found if one.path == newest), 0)
        old = [one.path for one in found if one.document.step < step]
        for path in old[: max(0, len(old) - (keep - 1))]:
            hidden = self._hidden(path, _REMOVING)
            path.rename(hidden)
            sync(self.root)
            shutil.rmtree(hidden)

    def check_model(self, parameters: Collection[str]) -> None:
        """Raises: CheckpointError if the folder has checkpoints of a model whose parameters have other names."""
        for one in self.found():
            other = sorted(set(one.document.parameters) ^ set(parameters))
            if other:
                raise CheckpointError(
                    f"{self.root} holds checkpoints of another model: {one.path.name} differs in {other[0]!r} "
                    f"({len(other)} names in all); give each run a folder of its own"
                )

    def newest(self) -> Path:
        """The checkpoint that was saved last.

        Raises: CheckpointMissing if there is none; CheckpointDamaged if one of them does not look whole, because it
            could be the last.
        """
        names = self.names()
        found = self.found()
        damaged = [path for path in names if path not in {one.path for one in found}]
        if damaged:
            whole = f"{found[-1].path} is the last that looks whole" if found else "none of them looks whole"
            reason = _reason(damaged[-1])
            raise CheckpointDamaged(f"{reason}. {whole}: name it to go on from there, or remove {damaged[-1]}")
        if not found:
            raise CheckpointMissing(
                f"{self.root} holds no checkpoint (step-NNNNNN); name a folder that engine.save() was given"
            )
        return found[-1].path

    @staticmethod
    def _hidden(path: Path, suffix: str) -> Path:
        return path.with_name(f".{path.name}{suffix}")


def locate(path: Path) -> Path:
    """The checkpoint that `path` means: itself, or the newest of a run's folder. Raises: as `RunFolder.newest`."""
    if (path / document.NAME).exists():
        return path
    if _NAME.fullmatch(path.name) and path.is_dir():
        raise CheckpointDamaged(f"{path} has lost its {document.NAME}; take another checkpoint")
    return RunFolder(path).newest()


def paths_in(path: Path) -> list[Path]:
    """The checkpoint `path`, or all of a run's folder, damaged ones too. Raises: CheckpointMissing if there is none."""
    paths = [path] if _NAME.fullmatch(path.name) or (path / document.NAME).exists() else RunFolder(path).names()
    if not paths:
        raise CheckpointMissing(f"{path} holds no checkpoint (step-NNNNNN); name a folder that engine.save() was given")
    return paths


def checkpoints_in(path: Path) -> list[Found]:
    """The same with their documents. Raises: also CheckpointDamaged for the first whose document cannot be read."""
    return [Found(one, document.read(one)) for one in paths_in(path)]


def check_lengths(path: Path, read: Document) -> None:
    """Raises: CheckpointDamaged naming the first file that is missing, or has another length than was written."""
    for name, file in read.files.items():
        try:
            nbytes = (path / name).stat().st_size
        except FileNotFoundError:
            raise CheckpointDamaged(f"{path / name} is missing; take another checkpoint") from None
        if nbytes != file.nbytes:
            raise CheckpointDamaged(f"{path / name} has {nbytes} bytes, {file.nbytes} were written; take another one")


def _reason(path: Path) -> str:
    try:
        check_lengths(path, document.read(path))
    except CheckpointError as error:
        return str(error).partition(";")[0]
    return f"{path} was damaged a moment ago"


def _make_durably(folder: Path) -> None:
    """Make `folder` and what is missing above it; a loss of power then takes none of them."""
    absolute = folder.absolute()
    made = [path for path in (absolute, *absolute.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in made:
        sync(path.parent)
