"""How the store talks to each drive, and how much of the bytes each drive gets."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

from ..scheduler.storage import Backend, DriveTuning, OffloadIOError, ProbeReport, measure_drive
from .checksum import block_digests
from .document import FORMAT, VERSION, load, publish
from .errors import StoreCorrupt, StoreError

log = logging.getLogger(__name__)

DRIVE_NAME = "drive.json"
NUM_SHARES = 64  # shares are whole numbers that add up to about this
WORTH_PROBING_NBYTES = 1 << 30  # a probe moves about as much: for a smaller store it costs more than it saves
PROBE_S = 3.0


def tunings_for(
    backends: Sequence[Backend], given: Sequence[DriveTuning] | None, total_nbytes: int
) -> tuple[DriveTuning, ...]:
    """One tuning per directory: given, else measured earlier, else measured now if the store is large, else defaults.

    Raises: StoreError if the number given is another.
    """
    if given is not None:
        if len(given) != len(backends):
            raise StoreError(f"{len(given)} tunings for {len(backends)} directories; give one per directory")
        return tuple(given)
    return tuple(_tuning(backend, total_nbytes) for backend in backends)


def _tuning(backend: Backend, total_nbytes: int) -> DriveTuning:
    known = load_tuning(backend)
    if known is not None:
        return known
    if total_nbytes < WORTH_PROBING_NBYTES or backend.volatile:
        return DriveTuning()
    try:
        report = measure_drive(backend, seconds=PROBE_S, progress=log.debug, each=block_digests)
    except OffloadIOError as error:
        # Too full for the probe's file, or failing: the checks that follow say so better.
        log.warning("%s: the drive could not be measured (%s); using defaults", backend.root, error)
        return DriveTuning()
    save_report(backend, report)
    return report.tuning


def save_report(backend: Backend, report: ProbeReport) -> None:
    """Keep what was measured beside the store, for every later run in this directory."""
    publish(backend, DRIVE_NAME, {"format": FORMAT, "version": VERSION, "probe": dataclasses.asdict(report)})


def load_tuning(backend: Backend) -> DriveTuning | None:
    """What was measured earlier; None if nothing was or it cannot be read (it is only a hint)."""
    try:
        body: dict[str, Any] | None = load(backend, DRIVE_NAME)
        return None if body is None else ProbeReport(**body["probe"]).tuning
    except (StoreCorrupt, OSError, TypeError, KeyError, ValueError) as error:
        log.warning("%s: %s is ignored: %s", backend.root, DRIVE_NAME, error)
        return None


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
