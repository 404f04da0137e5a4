"""A trace file holds what was recorded, in the form that viewers draw, and survives a run that does not close it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.scheduler.chrome import ChromeTrace, TracedStep, read_trace, rows_of
from offload.scheduler.trace import LANES, Span, Wait

STEPS = [
    TracedStep(
        step=7,
        start_s=100.0,
        end_s=101.0,
        bound_s=0.75,
        spans=[
            Span("compute", 100.0, 100.5, "blocks.0", "call", 0, 100.0),
            Span("read", 100.25, 100.75, "blocks.1", "states", 4096, 100.0),
            Span("read", 100.5, 100.875, "blocks.2", "param", 8192, 100.125),
            Span("write", 99.5, 100.25, "blocks.0", "states", 4096, 99.25),
        ],
        waits=[Wait(100.5, 100.75, "blocks.1")],
    ),
    TracedStep(step=8, start_s=101.0, end_s=102.5, spans=[], waits=[]),
]


def write(path: Path) -> None:
    trace = ChromeTrace(path)
    for step in STEPS:
        trace.add(step)
    trace.close()
    trace.close()


def as_sets(step: TracedStep) -> tuple[int, float, float, float | None, frozenset[Span], frozenset[Wait]]:
    return step.step, step.start_s, step.end_s, step.bound_s, frozenset(step.spans), frozenset(step.waits)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    write(tmp_path / "t.json")
    assert [as_sets(step) for step in read_trace(tmp_path / "t.json")] == [as_sets(step) for step in STEPS]


def test_events_are_what_viewers_draw(tmp_path: Path) -> None:
    write(tmp_path / "t.json")
    events = json.loads((tmp_path / "t.json").read_text())
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
    groups = {e["pid"]: e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "process_name"}
    complete = [e for e in events if e["ph"] == "X"]
    assert list(groups.values()) == ["training thread", "link", "drive", "cores"]
    assert set(names.values()) == {"step", "compute", "wait", "read", "read (2)", "write"}
    for event in complete:
        assert names[event["pid"], event["tid"]].split(" ")[0] == event["cat"]
        assert {"ts", "dur", "name", "args"} <= event.keys()
    read = next(e for e in complete if e["args"].get("unit") == "blocks.2")
    assert read["args"] == {"unit": "blocks.2", "kind": "param", "bytes": 8192, "step": 7, "queued_us": 100.125e6}
    assert (read["ts"], read["dur"], read["name"]) == (100.5e6, 0.375e6, "param blocks.2")
    for one in complete:
        for other in complete:
            if one is not other and (one["pid"], one["tid"]) == (other["pid"], other["tid"]):
                assert one["ts"] + one["dur"] <= other["ts"] or other["ts"] + other["dur"] <= one["ts"]


def test_a_trace_that_was_not_closed_is_read(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    trace = ChromeTrace(path)
    trace.add(STEPS[0])
    assert [as_sets(step) for step in read_trace(path)] == [as_sets(STEPS[0])]
    trace.close()
    whole = path.read_text()
    path.write_text(whole[: whole.rindex('"wait for')])  # the system went down in the middle of an event
    (step,) = read_trace(path)
    assert (frozenset(step.spans), step.waits) == (frozenset(STEPS[0].spans), ())


def test_the_object_form_is_read_too(tmp_path: Path) -> None:
    write(tmp_path / "t.json")
    events = json.loads((tmp_path / "t.json").read_text())
    (tmp_path / "o.json").write_text(json.dumps({"traceEvents": events}))
    assert len(read_trace(tmp_path / "o.json")) == 2


@pytest.mark.parametrize("text", ["", "hello", "3", '[{"ph":"X","ts":1,"dur":1}]', '[{"ph":"X","args":3}]', '{"a":1}'])
def test_another_file_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(ValueError, match=r"other\.json is .*engine\.trace"):
        read_trace(tmp_path / "other.json")


def test_every_lane_has_a_place(tmp_path: Path) -> None:
    trace = ChromeTrace(tmp_path / "t.json")
    spans = [Span(lane, 1.0, 2.0, "u", "k", 1, 1.0) for lane in LANES]
    trace.add(TracedStep(step=1, start_s=1.0, end_s=2.0, spans=spans, waits=[]))
    trace.close()
    assert {span.lane for span in read_trace(tmp_path / "t.json")[0].spans} == set(LANES)


intervals = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9)).map(lambda t: (float(t[0]), float(sum(t)))))


@given(intervals)
def test_rows_never_overlap_and_are_as_few_as_can_be(taken: list[tuple[float, float]]) -> None:
    rows = rows_of(taken)
    for i, one in enumerate(taken):
        for j in range(i):
            assert rows[i] != rows[j] or one[1] <= taken[j][0] or taken[j][1] <= one[0]
    most = max((sum(first <= t < last for first, last in taken) for t, _ in taken), default=0)
    assert max(rows, default=-1) + 1 == most
