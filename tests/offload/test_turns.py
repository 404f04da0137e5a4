"""Micro-batches that take turns: their sums are kept apart, added in their order, and leave whole."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from offload.turns import TurnSums


class Rig:
    """Two parameters of unit 0, one of unit 1; `open` says what may still come."""

    def __init__(self, num: int) -> None:
        self.a, self.b, self.c = (nn.Parameter(torch.zeros(1)) for _ in range(3))
        self.open = {(unit, number) for unit in range(2) for number in range(num)}
        self.sums = TurnSums(num, {self.a: 0, self.b: 0, self.c: 1}, lambda unit, number: (unit, number) in self.open)

    def give(self, parameter: nn.Parameter, number: int, value: float, dtype: torch.dtype = torch.float32) -> None:
        self.sums.take(number, parameter, torch.tensor([value], dtype=dtype))


def test_a_unit_leaves_when_nothing_more_can_come() -> None:
    rig = Rig(2)
    for number in range(2):
        rig.give(rig.a, number, 1.0)
        assert rig.sums.complete(0) == {}
    rig.open.remove((0, 1))
    assert rig.sums.complete(0) == {}, "the first micro-batch is still to come"
    rig.open.remove((0, 0))
    assert rig.sums.complete(0) == {rig.a: torch.tensor([2.0])}
    assert rig.sums.complete(0) == {} and list(rig.sums.rest()) == []


def test_micro_batches_are_added_in_their_order_however_they_come() -> None:
    """fp32: (1 + tiny) + tiny is 1, and 1 + (tiny + tiny) is more."""
    tiny = 2.0**-24
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        rig = Rig(3)
        for number in order:
            rig.give(rig.c, number, 1.0 if not number else tiny)
            rig.open.remove((1, number))
            left = rig.sums.complete(1)
            assert bool(left) == (number == order[-1])
        assert left[rig.c].item() == 1.0


def test_a_micro_batchs_sum_is_complete_before_it_is_added() -> None:
    tiny = 2.0**-24
    rig = Rig(2)
    rig.give(rig.a, 0, 1.0)
    rig.give(rig.a, 1, tiny)
    rig.open.remove((0, 0))
    assert rig.sums.complete(0) == {}
    rig.give(rig.a, 1, tiny)
    rig.open.remove((0, 1))
    assert rig.sums.complete(0)[rig.a].item() == 1.0 + 2.0**-23


def test_dtypes_of_sums() -> None:
    """bf16: 1 + 1/256 rounds to 1. Within a micro-batch in the compute dtype, as autograd does; the rest in fp32."""
    small = 2.0**-8
    rig = Rig(2)
    rig.give(rig.a, 0, 1.0, torch.bfloat16)
    rig.give(rig.a, 0, small, torch.bfloat16)  # lost
    rig.give(rig.a, 1, small, torch.bfloat16)
    rig.open.clear()
    total = rig.sums.complete(0)[rig.a]
    assert total.dtype == torch.float32 and total.item() == 1.0 + small


def test_what_autograd_left_is_not_written_to() -> None:
    """It may share memory with a gradient that somebody still needs."""
    rig = Rig(2)
    shared = torch.tensor([1.0, 1.0])
    given: list[Tensor] = [shared[:1], shared[:1]]
    for number, gradient in enumerate(given):
        rig.sums.take(number, rig.a, gradient)
        rig.sums.take(number, rig.b, shared[1:])
    rig.open.clear()
    totals = rig.sums.complete(0)
    assert totals[rig.a].item() == totals[rig.b].item() == 2.0
    assert shared.tolist() == [1.0, 1.0]


def test_the_rest_leaves_at_the_end() -> None:
    rig = Rig(2)
    rig.give(rig.c, 1, 3.0)
    rig.give(rig.a, 0, 1.0)
    rig.give(rig.b, 1, 2.0)
    assert rig.sums.complete(0) == {} and rig.sums.complete(1) == {}
    assert list(rig.sums.rest()) == [(0, {rig.a: 1.0, rig.b: 2.0}), (1, {rig.c: 3.0})]
