"""Updates that a step has decided and that are not made yet. Each is made before its unit's next use."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

from .update import UnitUpdate


@dataclass(frozen=True, eq=False)
class Pending:
    """A decided update. It may not begin before `after` is done: the commit of the step before it.

    `made` is done when all that it changes is stored, and fails when it broke off.
    """

    update: UnitUpdate
    after: Future[bool] | None
    made: Future[None] = field(default_factory=Future)

    async def begin(self) -> None:
        """Invariant: no byte of a step changes before that step is durable, in host memory or in the store."""
        if self.after is not None:
            await asyncio.wrap_future(self.after)


class PendingUpdates:
    """What is still to be made, by unit, and how the first one that broke off did so. Safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pending: dict[int, Pending] = {}
        self._made: dict[int, Future[None]] = {}
        self._failure: BaseException | None = None
        self._reported = False

    def add(self, updates: Mapping[int, UnitUpdate], after: Future[bool] | None) -> dict[int, Future[None]]:
        """Take in the updates of a step that was just decided, by unit; the units have none pending. Returns their
        `made`."""
        with self._lock:
            assert not self._pending.keys() & updates.keys(), "a step is decided when the one before it has been made"
            added = {index: Pending(update, after) for index, update in updates.items()}
            self._pending.update(added)
            made = {index: pending.made for index, pending in added.items()}
            self._made.update(made)
        return made

    def take(self, unit: int) -> Pending | None:
        """Hand over the unit's update, if it has one; whoever takes it makes it."""
        with self._lock:
            return self._pending.pop(unit, None)

    def __contains__(self, unit: int) -> bool:
        return unit in self._pending

    def units(self) -> list[int]:
        with self._lock:
            return list(self._pending)

    def made(self, unit: int) -> Future[None] | None:
        """What is done when the unit's last decided update is stored, or was called off; None before its first."""
        with self._lock:
            return self._made.get(unit)

    # -- what went wrong

    @property
    def failure(self) -> BaseException | None:
        """Why an update broke off, or None. Parameters are of two different steps from then on."""
        return self._failure

    def failed(self, pending: Pending, error: BaseException) -> None:
        """This update broke off."""
        with self._lock:
            if self._failure is None:
                self._failure = error
        if not pending.made.done():
            pending.made.set_exception(error)

    def spoilt(self, error: BaseException) -> None:
        """Values or states were replaced in part: they are of two steps, as after an update that broke off."""
        with self._lock:
            if self._failure is None:
                self._failure = error
                self._reported = True

    def report(self) -> BaseException | None:
        """The failure, the first time that somebody asks; None ever after."""
        with self._lock:
            first, self._reported = not self._reported, self._failure is not None
            return self._failure if first else None
