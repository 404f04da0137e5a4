"""Traces in Chrome's format, which chrome://tracing and ui.perfetto.dev open: written step by step, read back whole."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .trace import LANES, Span, Wait

GROUPS = (
    ("training thread", ("step", "compute", "wait")),
    ("link", ("h2d", "d2h")),
    ("drive", ("read", "write")),
    ("cores", ("cpu",)),
)
_ROWS_PER_LANE = 1000  # distance between the thread numbers of lanes; operations of one lane that overlap need rows
_US = 1e6


@dataclass(frozen=True, kw_only=True)
class TracedStep:
    """What was recorded of one step. Times are `time.perf_counter()` seconds.

    Args:
        step: its number.
        start_s, end_s: when it began and ended.
        spans, waits: what ended in it, in no order.
        bound_s: seconds that it takes at least; None if nobody knows.
    """

    step: int
    start_s: float
    end_s: float
    spans: Sequence[Span]
    waits: Sequence[Wait]
    bound_s: float | None = None


class ChromeTrace:
    """A trace file that grows by one step at a time. Used from one thread.

    The file is one JSON array. Until `close` it lacks the closing bracket, which both viewers and `read_trace` forgive.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = Path(path).open("w", encoding="utf-8")  # noqa: SIM115  # stays open for as long as steps come
        self._rows = {lane: _Rows() for _, lanes in GROUPS for lane in lanes}
        self._named: set[tuple[str, int]] = set()
        self._file.write("[")
        self._between = "\n"
        for pid, (group, _) in enumerate(GROUPS, 1):
            self._write(_metadata(pid, 0, "process_name", {"name": group}))
            self._write(_metadata(pid, 0, "process_sort_index", {"sort_index": pid}))

    def add(self, step: TracedStep) -> None:
        """Append a step; steps come in order of time. Blocks for as long as the file system takes."""
        self._event("step", step.start_s, step.end_s, f"step {step.step}", {"step": step.step, "bound_s": step.bound_s})
        for span in sorted(step.spans, key=lambda span: span.start_s):
            arguments = {"unit": span.unit, "kind": span.kind, "bytes": span.nbytes, "step": step.step}
            arguments["queued_us"] = round(span.queued_s * _US, 3)
            self._event(span.lane, span.start_s, span.end_s, f"{span.kind} {span.unit}", arguments)
        for wait in sorted(step.waits, key=lambda wait: wait.start_s):
            arguments = {"unit": wait.unit, "step": step.step}
            self._event("wait", wait.start_s, wait.end_s, f"wait for {wait.unit}", arguments)
        self._file.flush()

    def close(self) -> None:
        """End the file. Safe to call twice."""
        if not self._file.closed:
            self._file.write("\n]\n")
            self._file.close()

    def _event(self, lane: str, start_s: float, end_s: float, name: str, arguments: dict[str, Any]) -> None:
        row = self._rows[lane].place(start_s, end_s)
        pid, tid = _place(lane, row)
        if (lane, row) not in self._named:
            self._named.add((lane, row))
            label = lane if row == 0 else f"{lane} ({row + 1})"
            self._write(_metadata(pid, tid, "thread_name", {"name": label}))
            self._write(_metadata(pid, tid, "thread_sort_index", {"sort_index": tid}))
        start_us, end_us = round(start_s * _US, 3), round(end_s * _US, 3)
        self._write(
            {
                "ph": "X",
                "pid": pid,
                "tid": tid,
                "ts": start_us,
                "dur": round(end_us - start_us, 3),
                "name": name,
                "cat": lane,
                "args": arguments,
            }
        )

    def _write(self, event: dict[str, Any]) -> None:
        self._file.write(self._between + json.dumps(event, separators=(",", ":")))
        self._between = ",\n"


class _Rows:
    """Rows of one lane: the first in which an operation overlaps none before it. Operations come in any order."""

    def __init__(self) -> None:
        self._busy: list[list[tuple[float, float]]] = []

    def place(self, start_s: float, end_s: float) -> int:
        for row, taken in enumerate(self._busy):
            # Only the last few can overlap: a lane's operations are added nearly in order.
            if all(end_s <= first or last <= start_s for first, last in taken[-64:]):
                taken.append((start_s, end_s))
                del taken[:-64]
                return row
        self._busy.append([(start_s, end_s)])
        return len(self._busy) - 1


def rows_of(intervals: Iterable[tuple[float, float]]) -> list[int]:
    """For each (start, end) the row in which it overlaps none of the others, as few rows as there are at once."""
    order = sorted(enumerate(intervals), key=lambda item: item[1])
    ends: list[float] = []
    rows = [0] * len(order)
    for index, (start_s, end_s) in order:
        row = next((row for row, busy_until_s in enumerate(ends) if busy_until_s <= start_s), len(ends))
        if row == len(ends):
            ends.append(end_s)
        ends[row] = end_s
        rows[index] = row
    return rows


def read_trace(path: str | os.PathLike[str]) -> list[TracedStep]:
    """The steps that a `ChromeTrace` wrote to `path`, in order; also of a run that ended without closing it.

    Raises: OSError; ValueError if the file is no such trace.
    """
    events = _parse(Path(path).read_text(encoding="utf-8"))
    if events is None:
        raise ValueError(f"{path} is no JSON; give a file that engine.trace(path) wrote")
    steps: dict[int, TracedStep] = {}
    spans: dict[int, list[Span]] = {}
    waits: dict[int, list[Wait]] = {}
    try:
        for event in _complete(events):
            number, lane = int(event["args"]["step"]), event["cat"]
            start_s = event["ts"] / _US
            end_s = (event["ts"] + event["dur"]) / _US
            if lane == "step":
                bound_s = event["args"]["bound_s"]
                steps[number] = TracedStep(
                    step=number, start_s=start_s, end_s=end_s, spans=(), waits=(), bound_s=bound_s
                )
            elif lane == "wait":
                waits.setdefault(number, []).append(Wait(start_s, end_s, event["args"]["unit"]))
            elif lane in LANES:
                known = event["args"]
                spans.setdefault(number, []).append(
                    Span(lane, start_s, end_s, known["unit"], known["kind"], known["bytes"], known["queued_us"] / _US)
                )
    except (KeyError, TypeError, AttributeError) as problem:
        raise ValueError(
            f"{path} is a trace of something else ({type(problem).__name__}: {problem}); give a file that "
            "engine.trace(path) wrote"
        ) from None
    return [
        replace(step, spans=spans.get(number, ()), waits=waits.get(number, ()))
        for number, step in sorted(steps.items())
    ]


def _parse(text: str) -> Any:
    """The JSON in `text`; of a file that was not closed, what had been written whole; None of anything else."""
    for attempt in (text, text + "\n]", text[: text.rfind("\n")].rstrip().rstrip(",") + "\n]"):
        try:
            return json.loads(attempt)
        except json.JSONDecodeError:
            continue
    return None


def _complete(events: Any) -> Iterator[dict[str, Any]]:
    """Events with a duration, out of an array of events or an object that holds one."""
    for event in events["traceEvents"] if isinstance(events, dict) else events:
        if event.get("ph") == "X":
            yield event


def _place(lane: str, row: int) -> tuple[int, int]:
    """(pid, tid) of a lane's row."""
    for pid, (_, lanes) in enumerate(GROUPS, 1):
        if lane in lanes:
            return pid, (lanes.index(lane) + 1) * _ROWS_PER_LANE + row
    raise ValueError(f"lane {lane!r} is none of {', '.join(LANES)}")


def _metadata(pid: int, tid: int, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "M", "pid": pid, "tid": tid, "name": name, "args": arguments}
