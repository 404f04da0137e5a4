"""Commits: everything a step wrote becomes durable in one rename, or nothing does."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ..scheduler.lanes import Lanes
from ..scheduler.storage import Backend, flush_fully
from .codec import encode
from .document import FORMAT, MANIFEST_NAME, VERSION, publish
from .endurance import EnduranceAccount
from .errors import StoreBroken, StoreError
from .gate import Gate
from .mover import Mover
from .slots import ExtentSlots


class Committer:
    """Makes steps durable, one at a time, in the order of the calls. Its coroutines run on one event loop.

    [Note: The order of a commit]
    1. All extents that the step wrote are sealed: from now on no write enters either of their slots.
    2. Their files are flushed. Only then may the manifest name them.
    3. The manifest is written under another name, flushed, renamed, and the directory flushed. The rename is the
       commit: before it a crash leaves the previous step, after the directory flush the new one.
    4. The seal is lifted. Only now may the next step write into the other slot: until here that slot held the only
       durable step.
    After a failure nothing is written any more (StoreBroken): a failed flush may have dropped pages silently, and
    whether the rename reached the drive is unknown. Either step that the manifest may name is whole.
    """

    def __init__(
        self, *, store_id: str, slots: Mapping[str, ExtentSlots], mover: Mover, manifest_backend: Backend, lanes: Lanes,
        gate: Gate, endurance: EnduranceAccount, every: int | None, step: int | None,
    ) -> None:  # fmt: skip
        self._store_id = store_id
        self._slots = slots
        self._mover = mover
        self._backend = manifest_backend
        self._lanes = lanes
        self._gate = gate
        self._endurance = endurance
        self._every = every
        self._turn: asyncio.Future[None] | None = None
        self._seals: dict[str, asyncio.Future[None]] = {}
        self._last_step = step
        self._last_sealed = step
        self.durable_step = step
        self.broken: StoreBroken | None = None
        self.flush_s = 0.0
        self.publish_s = 0.0
        self.num_commits = 0

    async def wait_writable(self, key: str) -> None:
        """Wait until a write may enter the other slot of `key`. Raises: StoreBroken if the commit in between failed."""
        while (seal := self._seals.get(key)) is not None:
            # Shielded, because the future belongs to the commit: a cancelled writer must not cancel it for others.
            await asyncio.shield(seal)
        if self.broken is not None:
            raise self.broken

    async def commit(self, step: int, extra: Mapping[str, Any], *, force: bool) -> bool:
        """Make everything written so far durable as `step`; see [Note: The order of a commit].

        Returns: True when the step is durable; False if this step is not one to be kept (durability N or "none").
        Raises: StoreError for a step that goes backwards or an extent written in part; StoreBroken if it failed.
        """
        if self.broken is not None:
            raise self.broken
        self._check(step)
        body_extra = encode(dict(extra))
        for slots in self._slots.values():
            slots.written_in_step.clear()
        self._last_step = step
        if self._every is None:
            for slots in self._slots.values():
                slots.dirty = False
            return False
        if not force and self._last_sealed is not None and step - self._last_sealed < self._every:
            return False
        # Sealed now, before any wait: a later step must not slip bytes into what this commit makes durable.
        sealed = {key: slots.seal() for key, slots in self._slots.items() if slots.dirty and not slots.extent.scratch}
        for slots in self._slots.values():
            slots.dirty = slots.dirty and slots.extent.scratch
        self._last_sealed = step
        before, done = self._turn, asyncio.get_running_loop().create_future()
        self._turn = done
        self._seals.update(dict.fromkeys(sealed, done))
        try:
            if before is not None:
                await asyncio.wait([before])
            if self.broken is not None:
                raise self.broken
            await self._make_durable(step, body_extra, sealed)
        except BaseException as error:
            self._fail(step, error)
            self._settle(done, sealed, ok=False)
            if isinstance(error, Exception):
                assert self.broken is not None
                raise self.broken from (None if error is self.broken else error)
            raise
        self.durable_step = step
        self._settle(done, sealed, ok=True)
        return True

    def _check(self, step: int) -> None:
        if self._last_step is not None and step < self._last_step:
            raise StoreError(f"commit of step {step} after step {self._last_step}: steps only go up")
        for slots in self._slots.values():
            missing = slots.missing_pieces() if not slots.sealed and not slots.extent.scratch else []
            if missing:
                raise StoreError(
                    f"step {step} wrote {slots.extent.key} in part: pieces {missing[:8]} of "
                    f"{len(slots.newest)} are missing; a step that writes an extent writes all of its pieces"
                )

    def _fail(self, step: int, error: BaseException) -> None:
        if self.broken is None:
            kept = "no step" if self.durable_step is None else f"step {self.durable_step}"
            self.broken = StoreBroken(
                f"committing step {step} failed ({type(error).__name__}: {error}). On the drive {kept} is intact; "
                f"nothing more will be written. Mend the cause and open the store again"
            )

    def _settle(self, done: asyncio.Future[None], sealed: Mapping[str, int], *, ok: bool) -> None:
        for key, slot in sealed.items():
            if self._seals.get(key) is done:
                del self._seals[key]
            self._slots[key].unseal(slot if ok else None)
        if self._turn is done:
            self._turn = None
        done.set_result(None)

    async def _make_durable(self, step: int, extra: Any, sealed: Mapping[str, int]) -> None:
        start_s = time.perf_counter()
        files = {place for key, slot in sealed.items() for place in self._mover.files_of(self._slots[key].extent, slot)}
        await self._flush(sorted(files))
        flushed_s = time.perf_counter()
        self._endurance.committed(self._mover.traffic.written_nbytes)
        body = self._body(step, extra, sealed)
        await self._lanes.write.run(self._publish, body, unit="store", kind="manifest", nbytes=0)
        self.flush_s += flushed_s - start_s
        self.publish_s += time.perf_counter() - flushed_s
        self.num_commits += 1

    async def _flush(self, files: Sequence[tuple[int, str]]) -> None:
        jobs = [self._lanes.write.run(self._flush_file, place, unit="store", kind="flush", nbytes=0) for place in files]
        results = await asyncio.gather(*jobs, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    def _flush_file(self, place: tuple[int, str]) -> None:
        with self._gate:
            flush_fully(self._mover.file(*place))

    def _publish(self, body: dict[str, Any]) -> None:
        with self._gate:
            publish(self._backend, MANIFEST_NAME, body)

    def _body(self, step: int, extra: Any, sealed: Mapping[str, int]) -> dict[str, Any]:
        extents = {}
        for key, slots in self._slots.items():
            slot = sealed.get(key, slots.committed)
            if slot is not None and not slots.extent.scratch:
                extents[key] = {"slot": slot, "checksums": slots.checksums[slot]}
        account = self._endurance.snapshot(self._mover.traffic.written_nbytes)
        return {
            "format": FORMAT,
            "version": VERSION,
            "id": self._store_id,
            "step": step,
            "extra": extra,
            "extents": extents,
            "endurance": dataclasses.asdict(account),
            "committed_unix_s": time.time(),
        }
