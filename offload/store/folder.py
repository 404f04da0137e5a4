"""The store's own sub-folder of each directory: made, locked, surveyed, and undone if the start fails."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..scheduler.storage import Backend, file_system, open_backend
from ..scheduler.storage.drive import COPY_ON_WRITE_FILE_SYSTEMS, MEMORY_FILE_SYSTEMS
from .document import MANIFEST_NAME, STORE_NAME, TEMPORARY_SUFFIX, load
from .errors import StoreCorrupt, StoreError, StoreExists
from .layout import DATA_NAME
from .lock import LOCK_NAME, DirectoryLock
from .tuning import DRIVE_NAME

log = logging.getLogger(__name__)

FOLDER_NAME = "offload-store"

BackendFactory = Callable[[Path], Backend]


@dataclass(frozen=True)
class InMemory:
    """Marks a factory whose backends are volatile: no folder is made and no lock taken before it is called."""

    factory: BackendFactory

    def __call__(self, root: Path) -> Backend:
        return self.factory(root)


def is_ours(name: str) -> bool:
    """Whether a file of this name in the store's folder was made by a store."""
    plain = name.removesuffix(TEMPORARY_SUFFIX)
    return (
        plain in (LOCK_NAME, STORE_NAME, MANIFEST_NAME, DRIVE_NAME)
        or DATA_NAME.match(plain) is not None
        or name.startswith(".probe-")
    )


@dataclass(kw_only=True)
class Folders:
    """The claimed folders of one store, in the order of its directories.

    Attributes: directories as given; backends, one per directory; locks held; made: folders that did not exist before.
    """

    directories: tuple[Path, ...]
    backends: list[Backend] = field(default_factory=list)
    locks: list[DirectoryLock] = field(default_factory=list)
    made: list[Path] = field(default_factory=list)
    lock_was_there: list[bool] = field(default_factory=list)

    def release(self) -> None:
        """Give the locks back. Safe to call twice."""
        for lock in self.locks:
            lock.release()

    def undo(self) -> None:
        """Remove the folders made here (empty but for the lock and what was measured) and give the locks back."""
        for lock, was_there in zip(self.locks, self.lock_was_there, strict=True):
            lock.release(remove=not was_there)
        for path in reversed(self.made):
            (path / DRIVE_NAME).unlink(missing_ok=True)
            try:
                path.rmdir()
            except OSError:
                log.debug("%s is not empty and stays", path)


def open_folders(directories: Sequence[Path | str], factory: BackendFactory | None, *, make: bool) -> Folders:
    """Make (if `make`) and lock the store's folder in every directory, and prove I/O there. Blocks.

    Raises: StoreError for a path that is a file, missing, doubled or not writable; StoreBusy if another engine holds
    one; ValueError if the drive does not give back what is written. Whatever was made is removed again.
    """
    if isinstance(directories, (str, os.PathLike)):
        directories = [Path(directories)]
    if not directories:
        raise StoreError("a store needs at least one directory")
    paths = tuple(Path(directory).expanduser().absolute() for directory in directories)
    if len({path.resolve() for path in paths}) != len(paths):
        raise StoreError(f"the same directory is given twice: {', '.join(map(str, paths))}; name each drive once")
    folders = Folders(directories=paths)
    try:
        for path in paths:
            _open_one(folders, path, factory, make)
    except BaseException:
        folders.undo()
        raise
    return folders


def _open_one(folders: Folders, path: Path, factory: BackendFactory | None, make: bool) -> None:
    root = path / FOLDER_NAME
    if isinstance(factory, InMemory):
        folders.backends.append(factory(root))
        return
    for place in (path, root):
        if os.path.lexists(place) and not place.is_dir():
            raise StoreError(f"{place} is a file; the store needs a directory: name another path")
    if make:
        _make_private(root, folders.made)
    elif not root.is_dir():
        return
    try:
        was_there = os.path.lexists(root / LOCK_NAME)
        folders.locks.append(DirectoryLock(root))
        folders.lock_was_there.append(was_there)
        folders.backends.append(open_backend(root) if factory is None else factory(root))
    except OSError as error:
        raise _refused(path, error) from error
    if make:
        _warn_about(path)


def _make_private(root: Path, made: list[Path]) -> None:
    """mkdir -p with mode 0700, noting every folder that was made."""
    missing = [place for place in (root, *root.parents) if not place.exists()]
    for place in reversed(missing):
        try:
            os.mkdir(place, 0o700)
        except FileExistsError:
            continue
        except OSError as error:
            raise _refused(place, error) from error
        made.append(place)


def _refused(path: Path, error: OSError) -> StoreError:
    if isinstance(error, StoreError):
        return error
    return StoreError(
        f"{path} cannot hold a store: {error.strerror or error}; name a directory that this user may write to"
    )


def _warn_about(path: Path) -> None:
    kind = file_system(path)
    if kind in MEMORY_FILE_SYSTEMS:
        log.warning(
            "%s is on %s, which is host memory and not a drive: its bytes come out of the memory that offloading is "
            "meant to save, and are lost at a power cut. Name a directory on an NVMe drive.",
            path,
            kind,
        )
    elif kind in COPY_ON_WRITE_FILE_SYSTEMS:
        log.warning(
            "%s is on %s, which allocates again when a block is rewritten: the space reserved now does not rule out a "
            "full drive later. ext4 or xfs keep the promise.",
            path,
            kind,
        )


@dataclass(frozen=True, kw_only=True)
class Leftover:
    """What a dead run left in one folder.

    `store` and `manifest` are bodies of documents, None where there is no such file; `damage` says why one cannot be
    read; `foreign` lists names that no store makes.
    """

    root: Path
    names: tuple[str, ...]
    store: dict[str, Any] | None
    manifest: dict[str, Any] | None
    damage: str
    foreign: tuple[str, ...]

    @property
    def is_store(self) -> bool:
        return self.store is not None or self.manifest is not None or bool(self.damage)

    @property
    def resumable(self) -> bool:
        """Whether a committed step may be here (a damaged store counts: a person must decide)."""
        if self.damage or self.manifest is not None:
            return True
        if self.store is None or self.store["durability"] == "none":
            return False
        if self.store["member"] == 0:
            return False  # the first directory holds the manifest; without one nothing was ever committed
        first = Path(self.store["directories"][0]) / FOLDER_NAME
        return (first / MANIFEST_NAME).exists() or not (first / STORE_NAME).exists()


def survey(backend: Backend) -> Leftover:
    """Look at a folder without changing it."""
    names = backend.names()
    damage = ""
    bodies: dict[str, dict[str, Any] | None] = {STORE_NAME: None, MANIFEST_NAME: None}
    for name in bodies:
        try:
            bodies[name] = load(backend, name)
        except (StoreCorrupt, OSError) as error:
            damage = str(error)
    return Leftover(
        root=backend.root,
        names=tuple(names),
        store=bodies[STORE_NAME],
        manifest=bodies[MANIFEST_NAME],
        damage=damage,
        foreign=tuple(name for name in names if not is_ours(name)),
    )


def clear_dead_runs(backends: Sequence[Backend], *, overwrite: bool) -> None:
    """Remove what a dead run left if nobody can miss it. The locks are held.

    A store that could be resumed goes only with `overwrite`; files that no store makes never go.
    Raises: StoreExists.
    """
    leftovers = [survey(backend) for backend in backends]
    for leftover in leftovers:
        if leftover.foreign:
            raise StoreExists(
                f"{leftover.root} holds files that are not a store's ({', '.join(leftover.foreign[:5])}); they are "
                f"left alone: move them, or name another directory"
            )
        if leftover.resumable and not overwrite:
            step = leftover.manifest["step"] if leftover.manifest else None
            held = f"step {step} of a run that can be resumed" if step is not None else "a store that may be resumable"
            raise StoreExists(
                f"{leftover.root} holds {held}{': ' + leftover.damage if leftover.damage else ''}. Continue it with "
                f"resume=True, discard it with overwrite=True, or name another directory"
            )
    for backend, leftover in zip(backends, leftovers, strict=True):
        if leftover.is_store:
            log.info("%s: replacing the store of a run that has ended", leftover.root)
        remove_store_files(backend, leftover.names)


def remove_store_files(backend: Backend, names: Sequence[str], *, keep: Sequence[str] = ()) -> None:
    """Remove a store's files, the manifest first: no moment shows a manifest without its data."""
    kept = {LOCK_NAME, DRIVE_NAME, *keep}
    doomed = [name for name in names if is_ours(name) and name not in kept]
    for name in sorted(doomed, key=lambda name: (name != MANIFEST_NAME, name != STORE_NAME, name)):
        backend.remove(name)
    if doomed:
        backend.sync_directory()
