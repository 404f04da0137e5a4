"""A lane whose calls take a given time: the same rig on every machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

from .lanes import Lane
from .trace import Trace

T = TypeVar("T")


class PacedLane(Lane):
    """A lane that does the work and then lets the rest of the call's time pass.

    Args:
        service_s: (kind, bytes) of a call -> the least seconds that it takes.
    """

    def __init__(self, name: str, num_threads: int, trace: Trace, service_s: Callable[[str, int], float]) -> None:
        super().__init__(name, num_threads, trace)
        self._service_s = service_s

    def _timed(
        self, queued_s: float, unit: str, kind: str, nbytes: int, work: Callable[..., T], args: tuple[Any, ...]
    ) -> T:
        def slowly() -> T:
            end_s = time.perf_counter() + self._service_s(kind, nbytes)
            result = work(*args)
            rest_s = end_s - time.perf_counter()
            if rest_s > 0:
                time.sleep(rest_s)
            return result

        return super()._timed(queued_s, unit, kind, nbytes, slowly, ())
