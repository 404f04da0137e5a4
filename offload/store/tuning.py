"""How the store talks to each drive, and how much of the bytes each drive gets."""

from __future__ import annotations

from collections.abc import Sequence

from ..scheduler.storage import Backend, DriveTuning
from .errors import StoreError

NUM_SHARES = 64  # shares are whole numbers that add up to about this


def tunings_for(
    backends: Sequence[Backend], given: Sequence[DriveTuning] | None, total_nbytes: int
) -> tuple[DriveTuning, ...]:
    """One tuning per directory. Raises: StoreError if the number given is another."""
    if given is not None:
        if len(given) != len(backends):
            raise StoreError(f"{len(given)} tunings for {len(backends)} directories; give one per directory")
        return tuple(given)
    return tuple(DriveTuning() for _ in backends)


def shares_of(tunings: Sequence[DriveTuning]) -> tuple[int, ...]:
    """Whole-number shares in proportion to bandwidth; equal if any directory was not measured.

    A piece is read about as often as it is written, so a drive's rate is that of moving one byte each way:
    2 / (1 / read + 1 / write).
    """
    rates = []
    for tuning in tunings:
        if not tuning.read_gb_s or not tuning.write_gb_s:
            return (1,) * len(tunings)
        rates.append(2 / (1 / tuning.read_gb_s + 1 / tuning.write_gb_s))
    return tuple(max(1, round(NUM_SHARES * rate / sum(rates))) for rate in rates)
