"""Making a store's files, all or none, and checking those of one that is there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..scheduler.storage import Backend, NoSpace, flush_fully
from .document import MANIFEST_NAME, STORE_NAME, load
from .errors import NotResumable, StoreCorrupt, StoreMissing
from .extent import Extent
from .genesis import Genesis
from .layout import Layout, plan_layout

RESERVE_NBYTES = 16 << 20  # kept free on each drive for manifests and the file system's own blocks


@contextlib.contextmanager
def make_files(backends: Sequence[Backend], layout: Layout, genesis: Genesis) -> Iterator[None]:
    """Reserve every file and write the birth certificates; if that or the body fails, remove them all again. Blocks.

    Raises: NoSpace before anything is written if the drives are too small, or when reserving fails.
    """
    _check_space(backends, layout, genesis.num_slots)
    made: list[tuple[Backend, str]] = []
    try:
        for directory, name, nbytes in layout.file_names(genesis.num_slots):
            backends[directory].reserve(name, nbytes)
            made.append((backends[directory], name))
            if genesis.every is not None:
                _flush(backends[directory], name)
        made += [(backend, STORE_NAME) for backend in backends]
        genesis.write(backends)
        yield
    except BaseException:
        for backend, name in made:
            backend.remove(name)
            backend.remove(f"{name}.tmp")
        raise


def _flush(backend: Backend, name: str) -> None:
    # The length of a slot must survive a power cut as surely as a step in the other one: a later re-open refuses a
    # store with a short file, and the first commit flushes only the slot that it wrote.
    file = backend.open(name)
    try:
        flush_fully(file)
    finally:
        file.close()


def check_total_space(backends: Sequence[Backend], extents: Sequence[Extent], num_slots: int) -> None:
    """Refuse what cannot fit on all drives together, before any of them is measured. Raises: NoSpace."""
    needed_nbytes = sum(extent.nbytes * (1 if extent.scratch else num_slots) for extent in extents)
    free_nbytes = sum(backend.free_nbytes() for backend in backends)
    if needed_nbytes > free_nbytes:
        raise NoSpace(backends[0].root, needed_nbytes, free_nbytes)


def _check_space(backends: Sequence[Backend], layout: Layout, num_slots: int) -> None:
    by_drive: dict[Any, tuple[int, Backend]] = {}
    for directory, backend in enumerate(backends):
        # Two directories of one drive share its free space.
        drive = id(backend) if backend.volatile else os.stat(backend.root).st_dev
        needed = by_drive.get(drive, (RESERVE_NBYTES, backend))[0] + layout.needed_nbytes(directory, num_slots)
        by_drive[drive] = (needed, backend)
    for needed_nbytes, backend in by_drive.values():
        free_nbytes = backend.free_nbytes()
        if needed_nbytes > free_nbytes:
            raise NoSpace(backend.root, needed_nbytes, free_nbytes)


def open_committed(backends: Sequence[Backend], directories: Sequence[Path]) -> tuple[Genesis, dict[str, Any], Layout]:
    """Read and check the documents of a store, and that its files are there in full length. Blocks.

    Raises: StoreMissing, NotResumable, StoreCorrupt; each names the directory and what is wrong with it.
    """
    bodies = []
    for directory, backend in zip(directories, backends, strict=False):
        body = load(backend, STORE_NAME)
        if body is not None:
            bodies.append(body)
            continue
        raise StoreMissing(
            f"{directory} holds no store; name the directory of the run to resume, or start without resume"
        )
    if len(backends) < len(directories):
        raise StoreMissing(
            f"not every one of {', '.join(map(str, directories))} holds a store to resume; name the directories of the "
            "run, or start without resume"
        )
    genesis = Genesis.of(bodies[0])
    _check_members(bodies, directories, genesis)
    if genesis.durability == "none":
        raise NotResumable(
            f'{directories[0]} was written with durability "none": it was never a whole step and cannot be resumed. '
            f'Start a new run with durability="step" to be able to resume it'
        )
    manifest = load(backends[0], MANIFEST_NAME)
    if manifest is None:
        raise NotResumable(f"{directories[0]}: the run ended before its first commit; there is no step to resume")
    if manifest["id"] != genesis.store_id:
        raise StoreCorrupt(
            f"{directories[0]}: {MANIFEST_NAME} belongs to store {manifest['id']}, not {genesis.store_id}; restore it"
        )
    layout = plan_layout(genesis.extents, genesis.shares)
    problems = [f"{path}: {problem}" for path, problem in file_problems(backends, layout, genesis.num_slots)]
    if problems:
        raise StoreCorrupt("the store is damaged: " + "; ".join(problems[:8]) + ". Restore the files from a copy")
    return genesis, manifest, layout


def _check_members(bodies: Sequence[dict[str, Any]], directories: Sequence[Path], genesis: Genesis) -> None:
    if len(genesis.shares) != len(directories):
        raise StoreMissing(
            f"the store in {directories[0]} lies on {len(genesis.shares)} directories "
            f"({', '.join(genesis.directories)}), {len(directories)} were given; name all of them"
        )
    for member, (body, directory) in enumerate(zip(bodies, directories, strict=True)):
        if body["id"] != genesis.store_id or body["member"] != member:
            raise StoreMissing(
                f"{directory} holds part {body['member']} of store {body['id']}, expected part {member} of "
                f"{genesis.store_id}; give the directories in the order {', '.join(genesis.directories)}"
            )


def file_problems(backends: Sequence[Backend], layout: Layout, num_slots: int) -> list[tuple[Path, str]]:
    """Files that are missing or of another length than the store made them."""
    problems = []
    for directory, name, nbytes in layout.file_names(num_slots):
        size_nbytes = backends[directory].size_nbytes(name)
        if size_nbytes is None:
            problems.append((backends[directory].root / name, "is missing"))
        elif size_nbytes != nbytes:
            problems.append((backends[directory].root / name, f"has {size_nbytes} bytes instead of {nbytes}"))
    return problems
