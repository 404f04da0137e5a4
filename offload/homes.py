"""Homes: where one kind of one unit rests between uses, in host memory or in the store."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

from torch import Tensor

from .layout import KINDS, Chunk, ChunkArrays, UnitLayout
from .scheduler.devices import Device
from .scheduler.lanes import Lanes
from .scheduler.pool import Pool
from .scheduler.storage import NEEDED_SOON


class PieceStore(Protocol):
    """The part of the store that moves bytes; see `offload.store.Store`."""

    async def read(self, key: str, piece: int, buffer: Tensor, *, needed: int = NEEDED_SOON) -> None: ...
    async def write(self, key: str, piece: int, buffer: Tensor) -> None: ...


class Home:
    """The resting place of one range, cut into pieces.

    `buffer` is the range itself (uint8 [nbytes]) where it rests in host memory, and None where it rests in the store.
    """

    def __init__(
        self,
        unit: str,
        kind: str,
        piece_nbytes: Sequence[int],
        *,
        buffer: Tensor | None = None,
        store: PieceStore | None = None,
    ) -> None:
        self.key = f"{unit}/{kind}"
        self.unit = unit
        self.kind = kind
        self.piece_nbytes = tuple(piece_nbytes)
        self.nbytes = sum(piece_nbytes)
        self._offsets = [0, *accumulate(piece_nbytes)]
        self._store = store
        self.buffer = buffer

    @property
    def tier(self) -> str:
        return "host" if self.buffer is not None else "nvme"

    def piece(self, index: int, whole: Tensor | None = None) -> Tensor:
        """Piece `index` inside `whole` (a buffer of the range's size), by default inside the resting buffer."""
        source = self.buffer if whole is None else whole
        assert source is not None
        return source[self._offsets[index] : self._offsets[index + 1]]

    async def read(self, index: int, into: Tensor, needed: int = NEEDED_SOON) -> None:
        """Fill `into` with piece `index`. Only for a home in the store. `needed` orders the queue of its drive."""
        assert self._store is not None
        await self._store.read(self.key, index, into, needed=needed)

    async def write(self, index: int, source: Tensor) -> None:
        """Write piece `index`. Only for a home in the store; `source` stays unchanged until this returns."""
        assert self._store is not None
        await self._store.write(self.key, index, source)

    async def read_all(self, into: Tensor, needed: int = NEEDED_SOON) -> None:
        """Fill `into` (uint8, at least [nbytes]) with the whole range. Only for a home in the store."""
        await gather_all(self.read(i, self.piece(i, into), needed) for i in range(len(self.piece_nbytes)))

    async def write_all(self, source: Tensor) -> None:
        """Write the whole range from `source`. Only for a home in the store."""
        await gather_all(self.write(i, self.piece(i, source)) for i in range(len(self.piece_nbytes)))


async def gather_all(coroutines: Iterable[Awaitable[None]]) -> None:
    """Await all coroutines; when one fails, wait for the others to end before raising the first failure.

    Plain `asyncio.gather` returns at the first failure while its siblings run on, with buffers that the caller
    is about to release.
    """
    results = await asyncio.gather(*coroutines, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result


@dataclass(frozen=True, eq=False)
class DeviceRing:
    """A device with a memory of its own on which the work on some chunks runs.

    Args:
        pool: device memory; a chunk in flight takes one lease, for all of its kinds.
        chunks: the chunks that are updated there.
    """

    device: Device
    pool: Pool
    chunks: Collection[Chunk]


class ChunkStream:
    """Streams chunks of units through a fixed ring, so that staging does not grow with the size of a unit.

    A chunk that is updated on the device goes on from the ring in host memory into one there, is worked on, and comes
    back into the same host buffers. Each direction of the link and the device have their own lane, and the ring holds
    several chunks, so that all three work at once.

    Args:
        ring: the pool that staging for kinds in the store is leased from.
        lanes: for the `cpu` lane, in which the work on a chunk runs, and the link's and `compute` where it runs on the
            device.
        device_ring: which chunks are updated on the device; None: all on the host.
    """

    def __init__(self, ring: Pool, lanes: Lanes, device_ring: DeviceRing | None = None) -> None:
        self._ring = ring
        self._lanes = lanes
        self._device_ring = device_ring

    async def visit(
        self,
        layout: UnitLayout,
        homes: dict[str, Home],
        work: Callable[[Chunk, ChunkArrays], None],
        *,
        reads: Collection[str] = (),
        writes: Collection[str] = (),
        label: str,
        chunks: Sequence[Chunk] | None = None,
        held: Mapping[str, Tensor] | None = None,
        present: bool = False,
        computed: Callable[[], None] | None = None,
        needed: int = NEEDED_SOON,
        may_use_device: bool = False,
    ) -> None:
        """Call `work(chunk, arrays)` once for each chunk, in a lane's thread, several chunks in flight.

        Kinds in `reads` hold their bytes when `work` runs; kinds in `writes` are stored afterwards. Kinds that rest in
        host memory are worked on where they rest. Raises what a lane or `work` raises, after all chunks have let go.

        Args:
            held: buffers (uint8, at least the range's size) that take the place of the ring for some kinds.
            present: what is `held` holds the bytes of its home already.
            computed: called on the loop after `work` has run on a chunk, before it is stored.
            needed: orders the reads in the queues of the drives.
            may_use_device: `work` takes arrays in host memory or on the device, and leaves the same bits in both.
        """
        chosen = layout.chunks if chunks is None else chunks
        visit = _Visit(
            layout,
            homes,
            work,
            frozenset(reads),
            frozenset(writes),
            label,
            held or {},
            present,
            computed,
            needed,
            self._device_ring if may_use_device else None,
        )
        await gather_all(self._one(visit, chunk) for chunk in chosen)

    async def _one(self, visit: _Visit, chunk: Chunk) -> None:
        homes, held, name = visit.homes, visit.held, visit.layout.unit.name
        used = {k: chunk.pieces[k] for k in KINDS if k in visit.reads | visit.writes and k in chunk.pieces}
        stored = [kind for kind in used if homes[kind].buffer is None]
        staged = [kind for kind in stored if kind not in held]
        sizes = {kind: homes[kind].piece_nbytes[index] for kind, index in used.items()}
        need = sum(sizes[kind] for kind in staged)
        lease = await self._ring.acquire(need, f"{name} {visit.label}") if need else None
        try:
            buffers: dict[str, Tensor] = {}
            offset = 0
            for kind in used:
                home = homes[kind]
                if home.buffer is not None:
                    buffers[kind] = home.piece(used[kind])
                elif kind in held:
                    buffers[kind] = home.piece(used[kind], held[kind])
                else:
                    assert lease is not None
                    buffers[kind] = lease.buffer[offset : offset + sizes[kind]]
                    offset += sizes[kind]
            absent = staged if visit.present else stored
            await gather_all(
                homes[kind].read(used[kind], buffers[kind], visit.needed) for kind in absent if kind in visit.reads
            )
            if visit.device_ring is not None and chunk in visit.device_ring.chunks:
                await self._work_on_device(visit, visit.device_ring, chunk, buffers)
            else:
                arrays = visit.layout.chunk_arrays(chunk, buffers)
                await self._lanes.cpu.run(
                    visit.work, chunk, arrays, unit=name, kind=visit.label, nbytes=sum(sizes.values())
                )
            if visit.computed is not None:
                visit.computed()
            await gather_all(homes[kind].write(used[kind], buffers[kind]) for kind in stored if kind in visit.writes)
        finally:
            if lease is not None:
                lease.release()

    async def _work_on_device(
        self, visit: _Visit, ring: DeviceRing, chunk: Chunk, buffers: Mapping[str, Tensor]
    ) -> None:
        """Bring the chunk's pieces (uint8 by kind, in host memory) to the device, work there, bring back what changed.

        Invariant: each of the three begins when the one before it has ended for all kinds; the lease ends after all.
        """
        span: dict[str, Any] = {"unit": visit.layout.unit.name, "kind": visit.label}
        sizes = {kind: buffer.numel() for kind, buffer in buffers.items()}
        nbytes = sum(sizes.values())
        lease = await ring.pool.acquire(nbytes, f"{visit.layout.unit.name} {visit.label}")
        try:
            there: dict[str, Tensor] = {}
            offset = 0
            for kind, size in sizes.items():
                there[kind] = lease.buffer[offset : offset + size]
                offset += size
            await gather_all(
                self._lanes.h2d.run(ring.device.upload, there[k], buffers[k], lease.fence, **span, nbytes=sizes[k])
                for k in buffers
                if k in visit.reads
            )
            arrays = visit.layout.chunk_arrays(chunk, there)
            await self._lanes.compute.run(ring.device.compute, visit.work, chunk, arrays, **span, nbytes=nbytes)
            await gather_all(
                self._lanes.d2h.run(ring.device.download, buffers[k], there[k], None, **span, nbytes=sizes[k])
                for k in buffers
                if k in visit.writes
            )
        finally:
            lease.release()


@dataclass(frozen=True, eq=False)
class _Visit:
    """One call of `ChunkStream.visit`."""

    layout: UnitLayout
    homes: dict[str, Home]
    work: Callable[[Chunk, ChunkArrays], None]
    reads: frozenset[str]
    writes: frozenset[str]
    label: str
    held: Mapping[str, Tensor]
    present: bool
    computed: Callable[[], None] | None
    needed: int
    device_ring: DeviceRing | None
