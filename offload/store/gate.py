"""The door between threads that use files and the one that closes them."""

from __future__ import annotations

import threading

from .errors import StoreClosed


class Gate:
    """Counts the threads inside (`with gate:`); once shut, nobody enters. Safe from any thread."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._num_inside = 0
        self._shut = False

    @property
    def is_shut(self) -> bool:
        return self._shut

    def check(self) -> None:
        """Raises: StoreClosed if the gate is shut."""
        if self._shut:
            raise StoreClosed("the store is closed; open it again to read, write or commit")

    def __enter__(self) -> None:
        with self._condition:
            self.check()
            self._num_inside += 1

    def __exit__(self, *_: object) -> None:
        with self._condition:
            self._num_inside -= 1
            self._condition.notify_all()

    def shut(self, grace_s: float) -> bool:
        """Let nobody in any more and wait until all are out; False if some are still inside after `grace_s`."""
        with self._condition:
            self._shut = True
            return self._condition.wait_for(lambda: self._num_inside == 0, grace_s)
