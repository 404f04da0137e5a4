"""A paced lane does the work, lets the rest of its time pass, and records both as one span."""

from __future__ import annotations

import asyncio
import time

import pytest

from offload.scheduler.paced_lane import PacedLane
from offload.scheduler.trace import Trace


@pytest.mark.parametrize(("work_s", "ends_s"), [(0.25, 102.0), (5.0, 105.0)])
def test_a_call_takes_its_time_or_that_of_its_work(
    work_s: float, ends_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = Trace()
    lane = PacedLane("cpu", 1, trace, lambda kind, nbytes: nbytes / 32 if kind == "update" else 0.0)
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))

    def work(result: str) -> str:
        now[0] += work_s
        return result

    async def main() -> None:
        assert await lane.run(work, "done", unit="blocks.0", kind="update", nbytes=64) == "done"

    asyncio.run(main())
    lane.close()
    (span,), _ = trace.drain()
    assert (span.kind, span.nbytes, span.start_s) == ("update", 64, 100.0)
    assert span.end_s == pytest.approx(ends_s)
