"""Looking at a store from outside: what lives where, whether it is whole, and what a dead run left behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..scheduler.hostmem import allocate_pages
from ..scheduler.storage import Backend, OffloadIOError, PosixBackend, read_fully, view_of
from .checksum import block_digests, piece_checksum
from .create import file_problems
from .document import TEMPORARY_SUFFIX
from .errors import NotResumable, StoreCorrupt, StoreError, StoreMissing
from .extent import Extent
from .folder import FOLDER_NAME, Folders, Leftover, open_folders, remove_store_files, survey
from .genesis import Genesis
from .layout import DATA_NAME, Layout, file_name, plan_layout, stem_of
from .lock import LOCK_NAME
from .tuning import DRIVE_NAME


@dataclass(frozen=True, kw_only=True)
class ExtentRow:
    """Where the committed bytes of one extent are. `slot` is None before its first commit, and for scratch."""

    key: str
    unit: str
    kind: str
    nbytes: int
    num_pieces: int
    slot: int | None
    directories: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What the documents of a store say. `resumable` is False where `why_not` says why."""

    directories: tuple[Path, ...]
    durability: str | int
    step: int | None
    resumable: bool
    why_not: str
    identity: Any
    rows: tuple[ExtentRow, ...]
    file_nbytes: int
    endurance: dict[str, Any]
    created_unix_s: float


def _plain(path: Path | str) -> Path:
    """The directory that was given to the engine, also if its store folder itself is named."""
    path = Path(path).expanduser().absolute()
    return path.parent if path.name == FOLDER_NAME else path


def find_store(directories: Sequence[Path | str]) -> tuple[tuple[Path, ...], Genesis, Leftover]:
    """All directories of the store that the given ones belong to, its certificate, and the first folder's survey.

    Changes nothing and takes no lock. Any of the store's directories will do, in any order; the others are looked for
    where the store says they are. Raises: StoreMissing, StoreCorrupt; StoreError for directories of different runs.
    """
    members: dict[int, Path] = {}
    genesis: Genesis | None = None
    for directory in map(_plain, directories):
        if not (directory / FOLDER_NAME).is_dir():
            raise StoreMissing(f"{directory} holds no store; name the directory that the engine was given as nvme=")
        here = _look_at(directory)
        if here.store is None:
            raise StoreCorrupt(here.damage) if here.damage else StoreMissing(f"{directory} holds no store")
        found, member = Genesis.of(here.store), here.store["member"]
        if genesis is not None and (found.store_id != genesis.store_id or members.get(member, directory) != directory):
            other = members.get(member, next(iter(members.values())))
            raise StoreError(
                f"{other} holds part of store {genesis.store_id}, {directory} part {member} of store {found.store_id}: "
                f"they are not the parts of one store; name the directories of one run at a time"
            )
        genesis = found
        members[member] = directory
    if genesis is None:
        raise StoreError("no directory was given; name the one that the engine was given as nvme=")
    places = tuple(members.get(number, Path(path)) for number, path in enumerate(genesis.directories))
    if not (places[0] / FOLDER_NAME).is_dir():
        raise StoreMissing(f"the store's first directory {places[0]} is not there; name all of its directories")
    return places, genesis, _look_at(places[0])


def _look_at(directory: Path) -> Leftover:
    return survey(PosixBackend(directory / FOLDER_NAME, direct=False))


def by_store(directories: Sequence[Path | str]) -> list[list[Path]]:
    """The directories, those of one store together; one that names no store stays alone."""
    groups: dict[str, list[Path]] = {}
    for directory in map(_plain, directories):
        body = _look_at(directory).store if (directory / FOLDER_NAME).is_dir() else None
        groups.setdefault(str(directory) if body is None else body["id"], []).append(directory)
    return list(groups.values())


def inspect_store(directories: Sequence[Path | str]) -> Inspection:
    """Read the documents of a store; safe while an engine uses it. Raises: StoreMissing, StoreCorrupt."""
    places, genesis, first = find_store(directories)
    layout = plan_layout(genesis.extents, genesis.shares)
    manifest = first.manifest
    why_not = ""
    if genesis.durability == "none":
        why_not = 'durability "none"'
    elif first.damage:
        why_not = first.damage
    elif manifest is None:
        why_not = "no step was committed"
    return Inspection(
        directories=places,
        durability=genesis.durability,
        step=manifest["step"] if manifest else None,
        resumable=not why_not,
        why_not=why_not,
        identity=genesis.identity,
        rows=tuple(_row(extent, layout, manifest) for extent in genesis.extents),
        file_nbytes=sum(nbytes for _, _, nbytes in layout.file_names(genesis.num_slots)),
        endurance=manifest["endurance"] if manifest else {},
        created_unix_s=genesis.created_unix_s,
    )


def _row(extent: Extent, layout: Layout, manifest: dict[str, Any] | None) -> ExtentRow:
    entry = manifest["extents"].get(extent.key) if manifest else None
    runs = [run for piece in layout.segments[extent.key] for run in piece]
    return ExtentRow(
        key=extent.key,
        unit=extent.unit,
        kind=extent.kind,
        nbytes=extent.nbytes,
        num_pieces=len(extent.piece_nbytes),
        slot=entry["slot"] if entry else None,
        directories=tuple(sorted({run.directory for run in runs})),
    )


def verify_store(
    directories: Sequence[Path | str], *, progress: Callable[[int, int], None] | None = None, num_threads: int = 4
) -> list[str]:
    """Read every committed byte and compare its checksum; returns one line per damage, none if the store is whole.

    Takes the lock, so no engine may be using the store. `progress` is called with (bytes done, bytes in all).
    Raises: StoreBusy, StoreMissing, NotResumable; StoreCorrupt if the documents themselves are damaged.
    """
    places, genesis, first = find_store(directories)
    if first.damage:
        raise StoreCorrupt(first.damage)
    if first.manifest is None:
        raise NotResumable(f"{places[0]} holds no committed step; there is nothing to verify")
    folders = open_folders(places, None, make=False)
    try:
        if len(folders.backends) < len(places):
            raise StoreMissing(f"not every one of {', '.join(map(str, places))} is there")
        return _verify(folders, genesis, first.manifest, progress, num_threads)
    finally:
        folders.release()


def _verify(
    folders: Folders, genesis: Genesis, manifest: dict[str, Any], progress: Callable[[int, int], None] | None,
    num_threads: int,
) -> list[str]:  # fmt: skip
    layout = plan_layout(genesis.extents, genesis.shares)
    lines = [f"{path} {problem}" for path, problem in file_problems(folders.backends, layout, genesis.num_slots)]
    work = [
        (extent, piece, manifest["extents"][extent.key]["slot"], checksum)
        for extent in genesis.extents
        if extent.key in manifest["extents"]
        for piece, checksum in enumerate(manifest["extents"][extent.key]["checksums"])
    ]
    total, done = sum(extent.piece_nbytes[piece] for extent, piece, _, _ in work), 0
    with ThreadPoolExecutor(num_threads) as executor:
        for (extent, piece, _, _), line in zip(
            work, executor.map(lambda item: _check_piece(folders.backends, layout, *item), work), strict=True
        ):
            done += extent.piece_nbytes[piece]
            lines += [line] if line else []
            if progress is not None:
                progress(done, total)
    return lines


def _check_piece(
    backends: Sequence[Backend], layout: Layout, extent: Extent, piece: int, slot: int, expected: str
) -> str:
    """What is wrong with a committed piece, "" if nothing."""
    name = file_name(stem_of(extent.unit), slot, extent.scratch)
    view = view_of(allocate_pages(extent.piece_nbytes[piece]))
    runs = layout.segments[extent.key][piece]
    try:
        digests = []
        for run in runs:
            part = view[run.piece_offset : run.piece_offset + run.nbytes]
            file = backends[run.directory].open(name)
            try:
                read_fully(file, part, run.offset)
            finally:
                file.close()
            digests.append(block_digests(part))
    except (OffloadIOError, OSError) as error:
        return f"{extent.described(piece)}: {error}"
    found = piece_checksum(digests)
    if found == expected:
        return ""
    path = backends[runs[0].directory].root / name
    return f"{extent.described(piece)} at offset {runs[0].offset} of {path}: checksum {found}, {expected} was committed"


@dataclass(frozen=True, kw_only=True)
class Garbage:
    """Files in one store folder that may be deleted, why, and their bytes on the drive. `names` may be empty."""

    root: Path
    names: tuple[str, ...]
    nbytes: int
    why: str


def list_garbage(directory: Path | str, *, resumable_too: bool = False) -> Garbage:
    """What a dead run left in one directory. Nothing is changed.

    A store that can be resumed, or is damaged, is listed only with `resumable_too`; of one that is kept, only
    temporary files and data files that it does not name are. What was measured of the drive stays.
    Raises: StoreMissing; StoreBusy if an engine is alive.
    """
    path = _plain(directory)
    if not (path / FOLDER_NAME).is_dir():
        raise StoreMissing(f"{path} holds no store folder; name the directory that the engine was given as nvme=")
    folders = open_folders([path], None, make=False)
    try:
        return _garbage(survey(folders.backends[0]), folders.lock_was_there[0], resumable_too=resumable_too)
    finally:
        folders.undo()


def _garbage(left: Leftover, lock_was_there: bool, *, resumable_too: bool) -> Garbage:
    ours = [name for name in left.names if DATA_NAME.match(name) or name.endswith((TEMPORARY_SUFFIX, ".json"))]
    ours += [name for name in left.names if name.startswith(".probe-")]
    if left.resumable and not resumable_too:
        known = set()
        if left.store is not None:
            genesis = Genesis.of(left.store)
            layout = plan_layout(genesis.extents, genesis.shares)
            files = layout.file_names(genesis.num_slots)
            known = {name for member, name, _ in files if member == left.store["member"]}
        named = {name for name in ours if DATA_NAME.match(name) and (name in known or left.store is None)}
        names = [name for name in ours if name not in named and not name.endswith(".json")]
        why = "temporary files and data that the store does not name; the store itself can be resumed and is kept"
    else:
        names = [name for name in ours if name != DRIVE_NAME] + [LOCK_NAME] * lock_was_there
        why = "a store that can be resumed" if left.resumable else "a store that can never be resumed"
        if not left.is_store:
            why = "what a store left that is gone"
    nbytes = sum((left.root / name).stat().st_blocks * 512 for name in names)
    return Garbage(root=left.root, names=tuple(sorted(names)), nbytes=nbytes, why=why if names else "nothing")


def delete_garbage(garbage: Garbage) -> None:
    """Delete exactly what `list_garbage` listed. Raises: StoreBusy if an engine has started since; StoreError."""
    folders = open_folders([garbage.root.parent], None, make=False)
    try:
        backend = folders.backends[0]
        gone = [name for name in garbage.names if backend.size_nbytes(name) is None]
        if gone:
            raise StoreError(f"{garbage.root} has changed since it was listed ({gone[0]} is gone); list it again")
        remove_store_files(backend, garbage.names)
        folders.locks[0].release(remove=LOCK_NAME in garbage.names)
    finally:
        folders.undo()
