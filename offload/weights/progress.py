"""How far the tiers are filled, for whoever shows it."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

_EVERY_S = 0.2


@dataclass(frozen=True, kw_only=True)
class FillProgress:
    """Bytes that have come to rest so far (parameters, masters and states), of all, and the seconds that took."""

    done_nbytes: int
    total_nbytes: int
    seconds: float

    @property
    def seconds_left(self) -> float | None:
        """At the speed so far; None before the first byte."""
        if not self.done_nbytes:
            return None
        return self.seconds * (self.total_nbytes - self.done_nbytes) / self.done_nbytes


Show = Callable[[FillProgress], object]


@contextlib.contextmanager
def report_filling(show: Literal["auto"] | Show | None, total_nbytes: int) -> Iterator[Callable[[int], None]]:
    """Gives a function that is told of bytes that have come to rest; `show` hears of some of them, and of the last.

    "auto": a line on standard error where that is a terminal, nothing elsewhere.
    """
    on_terminal = show == "auto" and sys.stderr.isatty()
    target: Show | None = _print_line if on_terminal else show if callable(show) else None
    began_s = time.perf_counter()
    done_nbytes, shown_s = 0, began_s

    def stored(nbytes: int) -> None:
        nonlocal done_nbytes, shown_s
        done_nbytes += nbytes
        now_s = time.perf_counter()
        if target is not None and (now_s - shown_s >= _EVERY_S or done_nbytes >= total_nbytes):
            shown_s = now_s
            target(FillProgress(done_nbytes=done_nbytes, total_nbytes=total_nbytes, seconds=now_s - began_s))

    try:
        yield stored
    finally:
        if on_terminal and shown_s > began_s:
            print(file=sys.stderr)


def describe(progress: FillProgress) -> str:
    """ "filling 3.2 of 24.0 GB, 41 s left"; GB = 1e9 B."""
    left_s = progress.seconds_left
    left = "" if left_s is None else f", {left_s:.0f} s left"
    return f"filling {progress.done_nbytes / 1e9:.1f} of {progress.total_nbytes / 1e9:.1f} GB{left}"


def _print_line(progress: FillProgress) -> None:
    print(f"\r{describe(progress):<60}", end="", file=sys.stderr, flush=True)
