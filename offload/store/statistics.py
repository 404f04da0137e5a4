"""A store's figures at one moment."""

from __future__ import annotations

from dataclasses import dataclass

from ..scheduler.storage import QueueStatistics
from .endurance import Endurance


@dataclass(frozen=True, kw_only=True)
class StoreStatistics:
    """A frozen snapshot; bytes and seconds are totals of this run.

    Attributes:
        read_nbytes, written_nbytes: piece bytes moved (documents not counted).
        num_retries: requests that failed in passing and were repeated.
        direct: transfers pass by the page cache.
        durable_step: last committed step, None before the first commit.
        num_commits, flush_s, publish_s: commits, and the time their two halves took.
        queues: one per directory; `oldest` names the request in flight longest (what a watchdog reports).
        endurance: the wear account.
    """

    read_nbytes: int
    written_nbytes: int
    num_retries: int
    direct: bool
    durable_step: int | None
    num_commits: int
    flush_s: float
    publish_s: float
    queues: tuple[QueueStatistics, ...]
    endurance: Endurance

    @property
    def in_flight_nbytes(self) -> int:
        return sum(queue.in_flight_nbytes for queue in self.queues)

    @property
    def peak_in_flight_nbytes(self) -> int:
        return max(queue.peak_in_flight_nbytes for queue in self.queues)
