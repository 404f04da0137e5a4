"""The wear account: what this store has written to its drives, and what that means per day."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

SECONDS_PER_DAY = 86400.0


@dataclass(frozen=True, kw_only=True)
class Endurance:
    """A frozen snapshot. Bytes are what the store handed to the drives; a drive may write more inside.

    Attributes:
        written_nbytes: since the store was made, over all runs that resumed it.
        step_nbytes: between the last two commits.
        num_commits: commits so far.
        active_s: seconds that the store was open.
        rated_nbytes: the maker's rated endurance (TBW), None if not given.
    """

    written_nbytes: int
    step_nbytes: int
    num_commits: int
    active_s: float
    rated_nbytes: int | None

    @property
    def per_day_nbytes(self) -> float:
        """Bytes that a day of this would write."""
        return self.written_nbytes / self.active_s * SECONDS_PER_DAY if self.active_s > 0 else 0.0

    @property
    def rated_share(self) -> float | None:
        """Share of the rated endurance used up by this store so far."""
        return self.written_nbytes / self.rated_nbytes if self.rated_nbytes else None

    @property
    def rated_days(self) -> float | None:
        """Days of this until the rated endurance is used up, counted from a new drive."""
        return self.rated_nbytes / self.per_day_nbytes if self.rated_nbytes and self.per_day_nbytes else None


class EnduranceAccount:
    """Adds up over the runs of one store; goes into every manifest."""

    def __init__(self, rated_nbytes: int | None, stored: dict[str, Any] | None = None) -> None:
        stored = stored or {}
        self._rated_nbytes = rated_nbytes if rated_nbytes is not None else stored.get("rated_nbytes")
        self._written_before = int(stored.get("written_nbytes", 0))
        self._active_before_s = float(stored.get("active_s", 0.0))
        self._num_commits = int(stored.get("num_commits", 0))
        self._step_nbytes = int(stored.get("step_nbytes", 0))
        self._opened_s = time.monotonic()
        self._at_commit_nbytes = 0

    def committed(self, written_nbytes: int) -> None:
        """Note a commit when this run has written `written_nbytes` in all."""
        self._num_commits += 1
        self._step_nbytes = written_nbytes - self._at_commit_nbytes
        self._at_commit_nbytes = written_nbytes

    def snapshot(self, written_nbytes: int) -> Endurance:
        return Endurance(
            written_nbytes=self._written_before + written_nbytes,
            step_nbytes=self._step_nbytes,
            num_commits=self._num_commits,
            active_s=self._active_before_s + time.monotonic() - self._opened_s,
            rated_nbytes=self._rated_nbytes,
        )
