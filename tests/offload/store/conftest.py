"""Small stores and page-aligned buffers for the tests of the store."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from offload.scheduler.hostmem import allocate_pages
from offload.scheduler.lanes import Lanes
from offload.scheduler.trace import Trace
from offload.store import Extent, Store

PAGE = 4096
IDENTITY = {"model": {"hidden": 8}, "optimizer": "adamw", "dtype": "bfloat16"}


@pytest.fixture
def lanes() -> Iterator[Lanes]:
    lanes = Lanes(Trace())
    yield lanes
    lanes.close()


def pages(nbytes: int, seed: int) -> Tensor:
    """A page-aligned uint8 [nbytes] buffer of reproducible noise."""
    buffer = allocate_pages(nbytes)
    buffer.copy_(torch.frombuffer(bytearray(random.Random(seed).randbytes(nbytes)), dtype=torch.uint8))
    return buffer


def extents(num_units: int = 2, pieces: tuple[int, ...] = (2 * PAGE, PAGE), scratch: bool = True) -> list[Extent]:
    """`num_units` units with parameters, states and (if `scratch`) a gradient extent each."""
    made = []
    for index in range(num_units):
        unit = f"blocks.{index}"
        for kind in ("param", "states", "grad")[: 3 if scratch else 2]:
            made.append(
                Extent(
                    key=f"{unit}/{kind}",
                    unit=unit,
                    kind=kind,
                    piece_nbytes=pieces,
                    scratch=kind == "grad",
                    parameters=(f"{unit}.weight", f"{unit}.bias"),
                )
            )
    return made


async def write_step(store: Store, members: list[Extent], step: int, *, commit: bool = True) -> None:
    """Write noise that depends on (step, extent, piece) into every piece that is not scratch, then commit."""
    jobs = [
        store.write(extent.key, piece, pages(nbytes, seed_of(step, extent.key, piece)))
        for extent in members
        if not extent.scratch
        for piece, nbytes in enumerate(extent.piece_nbytes)
    ]
    await asyncio.gather(*jobs)
    if commit:
        await store.commit(step, {"step": step})


async def check_step(store: Store, members: list[Extent], step: int) -> None:
    """Assert that every piece that is not scratch holds exactly what `write_step(step)` wrote."""
    for extent in members:
        for piece, nbytes in enumerate(() if extent.scratch else extent.piece_nbytes):
            got = allocate_pages(nbytes)
            await store.read(extent.key, piece, got)
            assert torch.equal(got, pages(nbytes, seed_of(step, extent.key, piece))), (extent.key, piece, step)


def seed_of(step: int, key: str, piece: int) -> int:
    return hash((step, piece)) ^ sum(key.encode())


def run(coroutine: Coroutine[Any, Any, Any], timeout_s: float = 60.0) -> Any:
    """Run to the end; a hang is an error, not a wait."""

    async def bounded() -> Any:
        return await asyncio.wait_for(coroutine, timeout_s)

    return asyncio.run(bounded())


def tree(directory: Path) -> dict[str, bytes]:
    """Every file below `directory` with its bytes."""
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()
    }


@pytest.fixture
def kit() -> SimpleNamespace:
    """The helpers of this file, since test modules do not import each other."""
    return SimpleNamespace(
        PAGE=PAGE, IDENTITY=IDENTITY, pages=pages, extents=extents, write_step=write_step, check_step=check_step,
        run=run, tree=tree, allocate=allocate_pages,
    )  # fmt: skip


@pytest.fixture
def make(lanes: Lanes, tmp_path: Path, kit: SimpleNamespace) -> Iterator[Callable[..., Store]]:
    """`make(extents, directories=..., **options)` creates a store that is closed after the test."""
    stores = []

    def create(members: list[Extent], directories: list[Path] | None = None, **options: Any) -> Store:
        store = Store.create(directories or [tmp_path / "nvme"], members, kit.IDENTITY, lanes, **options)
        stores.append(store)
        return store

    yield create
    for store in stores:
        store.close()
