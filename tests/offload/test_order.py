"""The learned order of use: a hint for prefetching that follows the last pass of the same kind."""

from __future__ import annotations

from offload.order import UseOrder


def test_first_guess_then_what_was_seen() -> None:
    order = UseOrder({"train": [0, 1, 2, 2, 1, 0], "eval": [0, 1, 2]})
    order.begin("train")
    assert list(order.upcoming()) == [0, 1, 2, 2, 1, 0]
    for unit in (0, 2, 2, 0):
        order.use(unit)
    order.begin("train")
    assert list(order.upcoming()) == [0, 2, 2, 0]


def test_prediction_goes_on_from_the_use_and_wraps_into_the_next_pass() -> None:
    order = UseOrder({"train": [0, 1, 2, 1, 0]})
    order.begin("train")
    order.use(0)
    assert list(order.upcoming()) == [1, 2, 1, 0, 0]
    order.use(1)
    order.use(2)
    assert list(order.upcoming()) == [1, 0, 0, 1, 2]


def test_unforeseen_use_does_not_lose_the_place() -> None:
    order = UseOrder({"train": [0, 1, 2]})
    order.begin("train")
    order.use(0)
    order.use(7)
    assert list(order.upcoming()) == [1, 2, 0]


def test_skipped_units_are_passed_over() -> None:
    order = UseOrder({"train": [0, 1, 2, 3]})
    order.begin("train")
    order.use(2)
    assert list(order.upcoming()) == [3, 0, 1, 2]


def test_kinds_of_passes_do_not_mix() -> None:
    order = UseOrder({"train": [0, 1, 1, 0], "eval": [0, 1]})
    order.begin("train")
    for unit in (0, 1, 1, 0):
        order.use(unit)
    order.begin("eval")
    for unit in (1, 0):
        order.use(unit)
    order.begin("train")
    assert list(order.upcoming()) == [0, 1, 1, 0]
    order.begin("eval")
    assert list(order.upcoming()) == [1, 0]


def test_pass_without_a_use_keeps_the_last_prediction() -> None:
    order = UseOrder({"train": [0, 1]})
    order.begin("train")
    order.begin("train")
    assert list(order.upcoming()) == [0, 1]
