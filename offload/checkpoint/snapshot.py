"""A true snapshot of one step, copied unit by unit while the next step already runs."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future


class Snapshot:
    """Keeps count of which units have been copied, and keeps their next update waiting until they are.

    Invariant: no byte of a unit changes between the update of the snapshot's step and the end of the unit's copy. One
    that did would bring half of the next step into the checkpoint.

    Whoever copies asks for `next()`, from one thread; updates ask with `wait_copied`, on the loop. The copy of a unit
    that somebody waits for is made next. It waits for nothing but the update of its own step, so both make progress.

    Args:
        made: for each unit, what is done when its update of the snapshot's step is stored, or None where it has none.
    """

    def __init__(self, made: Sequence[Future[None] | None]) -> None:
        self.made = made
        self._lock = threading.Lock()
        self._left = dict.fromkeys(range(len(made)))
        self._wanted: deque[int] = deque()
        self._copied: list[Future[None]] = [Future() for _ in made]

    def next(self) -> int | None:
        """A unit to copy: one that is waited for, else one that is up to date, else any; None when all are copied."""
        with self._lock:
            while self._wanted:
                unit = self._wanted.popleft()
                if unit in self._left:
                    return unit
            return next((unit for unit in self._left if self._is_made(unit)), next(iter(self._left), None))

    def copied(self, unit: int) -> None:
        """The unit's copy is complete."""
        with self._lock:
            del self._left[unit]
        self._copied[unit].set_result(None)

    def release(self) -> None:
        """There is no more copying, whatever is left: nobody waits any more."""
        for future in self._copied:
            if not future.done():
                future.set_result(None)

    async def wait_copied(self, unit: int) -> None:
        """Return when the next update of `unit` may begin."""
        copied = self.want(unit)
        if not copied.done() and self._is_made(unit):
            # Shielded: an update that is cancelled must not cancel the future for those who copy.
            await asyncio.shield(asyncio.wrap_future(copied))

    def want(self, unit: int) -> Future[None]:
        """What is done when `unit` has been copied, which is made next."""
        copied = self._copied[unit]
        if not copied.done() and self._is_made(unit):
            with self._lock:
                self._wanted.append(unit)
        return copied

    def _is_made(self, unit: int) -> bool:
        """Whether the update of the snapshot's own step is behind us; the one that asks may be that very update."""
        made = self.made[unit]
        return made is None or made.done()
