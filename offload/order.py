"""The order in which units are used, learned from the run. It is a hint: a wrong guess costs time, never a bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence


class UseOrder:
    """Records the uses of a pass and predicts the rest of it from the last pass of the same kind.

    A pass is one call of the wrapped module, with the backward that follows it ("train") or without ("eval").

    Args:
        initial: for each kind of pass, the order assumed before the first one.
    """

    def __init__(self, initial: Mapping[str, Sequence[int]]) -> None:
        self._last: dict[str, list[int]] = {kind: list(order) for kind, order in initial.items()}
        self._kind = next(iter(initial))
        self._now: list[int] = []
        self._cursor = 0

    def begin(self, kind: str) -> None:
        """A new pass starts; what was recorded becomes the prediction for its kind."""
        if self._now:
            self._last[self._kind] = self._now
        self._kind = kind
        self._now = []
        self._cursor = 0

    def use(self, unit: int) -> None:
        """Unit `unit` is used now."""
        self._now.append(unit)
        expected = self._last.get(self._kind, [])
        try:
            self._cursor = expected.index(unit, self._cursor) + 1
        except ValueError:
            pass  # not foreseen: the prediction goes on from where it was

    def upcoming(self) -> Iterator[int]:
        """Units in the order in which they should be needed next, this pass and then the next; with repeats."""
        expected = self._last.get(self._kind, [])
        yield from expected[self._cursor :]
        yield from expected[: self._cursor]
