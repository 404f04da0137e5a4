"""The arithmetic of the record: busy, moved and exposed, on intervals chosen by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.scheduler.trace import LANES, Span, Trace, Wait, busy_s, exposed_s, moved_nbytes, union_s


def span(lane: str, start: float, end: float, unit: str = "u", nbytes: int = 0, queued: float | None = None) -> Span:
    return Span(lane, start, end, unit, "param", nbytes, start if queued is None else queued)


def test_drain_hands_over_once() -> None:
    trace = Trace()
    trace.add(span("read", 0, 1))
    trace.add_wait(Wait(0, 1, "u"))
    assert trace.drain() == ([span("read", 0, 1)], [Wait(0, 1, "u")])
    assert trace.drain() == ([], [])


def test_what_starts_later_is_left_for_the_next_drain() -> None:
    trace = Trace()
    for start_s in (1.0, 3.0, 2.0):
        trace.add(span("read", start_s, start_s + 5))
    assert [one.start_s for one in trace.drain(2.0)[0]] == [1.0]
    assert [one.start_s for one in trace.drain()[0]] == [3.0, 2.0]


@pytest.mark.parametrize(
    ("intervals", "length"),
    [
        ([], 0),
        ([(1, 3)], 2),
        ([(1, 3), (2, 4)], 3),
        ([(1, 4), (2, 3)], 3),
        ([(5, 6), (1, 2)], 2),
        ([(1, 2), (2, 3)], 2),
        ([(1, 1)], 0),
    ],
)
def test_union(intervals: list[tuple[float, float]], length: float) -> None:
    assert union_s(intervals) == length


def test_busy_counts_overlap_in_a_lane_once() -> None:
    spans = [span("read", 0, 2), span("read", 1, 3), span("write", 1, 2), span("read", 10, 11)]
    assert busy_s(spans) == {**dict.fromkeys(LANES, 0), "read": 4, "write": 1}


def test_moved_adds_up() -> None:
    spans = [span("read", 0, 1, nbytes=5), span("read", 0, 1, nbytes=7), span("cpu", 0, 1, nbytes=3)]
    assert moved_nbytes(spans) == {**dict.fromkeys(LANES, 0), "read": 12, "cpu": 3}


def test_wait_is_charged_to_the_operations_of_its_unit() -> None:
    """Waiting [0, 10) for u: read of u in [1, 4), upload in [4, 6), nothing known in the rest."""
    spans = [span("read", 1, 4), span("h2d", 4, 6)]
    exposed = exposed_s(spans, [Wait(0, 10, "u")])
    assert (exposed["read"], exposed["h2d"], exposed["cpu"]) == (3, 2, 5)


def test_time_in_the_queue_is_the_lanes() -> None:
    exposed = exposed_s([span("read", 6, 8, queued=2)], [Wait(0, 8, "u")])
    assert (exposed["read"], exposed["cpu"]) == (6, 2)


def test_own_operations_come_before_others() -> None:
    spans = [span("write", 0, 5, unit="other"), span("read", 3, 5)]
    exposed = exposed_s(spans, [Wait(0, 5, "u")])
    assert (exposed["read"], exposed["write"], exposed["cpu"]) == (2, 3, 0)


def test_compute_is_never_charged_with_a_wait_for_itself() -> None:
    exposed = exposed_s([span("compute", 0, 5, unit="other")], [Wait(0, 5, "u")])
    assert (exposed["compute"], exposed["cpu"]) == (0, 5)


times = st.floats(0, 100, allow_nan=False)
spans_strategy = st.lists(
    st.builds(
        lambda lane, a, b, c, unit: span(lane, *sorted((a, b))[:2], unit=unit, queued=min(a, b, c)),
        st.sampled_from(LANES), times, times, times, st.sampled_from("uv"),
    )
)  # fmt: skip
waits_strategy = st.lists(st.builds(lambda a, b, u: Wait(min(a, b), max(a, b), u), times, times, st.sampled_from("uv")))


@given(spans_strategy, waits_strategy)
def test_every_second_of_waiting_is_charged_exactly_once(spans: list[Span], waits: list[Wait]) -> None:
    exposed = exposed_s(spans, waits)
    assert set(exposed) == set(LANES)
    assert all(seconds >= 0 for seconds in exposed.values())
    assert sum(exposed.values()) == pytest.approx(sum(wait.end_s - wait.start_s for wait in waits), abs=1e-6)


@given(spans_strategy)
def test_busy_lies_between_the_longest_and_the_sum(spans: list[Span]) -> None:
    for lane, busy in busy_s(spans).items():
        lengths = [s.end_s - s.start_s for s in spans if s.lane == lane]
        assert max(lengths, default=0) <= busy + 1e-9
        assert busy <= sum(lengths) + 1e-9
