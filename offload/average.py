"""The moving average of the weights, shown in their place for an evaluation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from .access import ParameterAccess
from .layout import UnitLayout
from .step import Stepper

NO_AVERAGE = "no average of the weights is kept; build the engine with OffloadConfig(ema_decay=0.999)"


class ShownAverage:
    """Exchanges weights and average where they rest, unit by unit, and back; nothing is kept twice.

    Args:
        kept: whether there is an average.
        before_write, after_write: see `Values`.
        spoilt: told when an exchange broke off, after which the unit is half the one and half the other.
    """

    def __init__(
        self,
        kept: bool,
        layouts: Sequence[UnitLayout],
        access: ParameterAccess,
        stepper: Stepper,
        before_write: Callable[[int], None],
        after_write: Callable[[int, bool], None],
        spoilt: Callable[[BaseException], None],
    ) -> None:
        self._kept = kept
        self._layouts = layouts
        self._access = access
        self._stepper = stepper
        self._before_write = before_write
        self._after_write = after_write
        self._spoilt = spoilt
        self._exchanged: list[UnitLayout] = []
        self._shown = False

    def check_kept(self) -> None:
        """Raises: RuntimeError where there is no average."""
        if not self._kept:
            raise RuntimeError(NO_AVERAGE)

    def check_hidden(self, what: str) -> None:
        """Raises: RuntimeError while the average is shown."""
        if self._shown:
            raise RuntimeError(
                f"{what} inside `with engine.averaged_weights():`, where the model has averaged weights; leave it first"
            )

    @contextlib.contextmanager
    def show(self) -> Iterator[None]:
        """See `OffloadEngine.averaged_weights`."""
        self.check_kept()
        self.check_hidden("averaged_weights()")
        try:
            self._shown = True
            if self._stepper.average_begun:  # until then the average is the weights themselves
                for layout in self._layouts:
                    if any(member.info.trainable for member in layout.members):
                        self._exchange(layout, self._exchanged.append)
            yield
        finally:
            self.hide()

    def hide(self) -> None:
        """The weights are the weights again, bit for bit. Nothing, where they are."""
        try:
            while self._exchanged:
                self._exchange(self._exchanged[-1], lambda _: self._exchanged.pop())
        except BaseException as error:
            self._spoilt(error)  # also between units: forwards would compute with weights here and averages there
            raise
        self._shown = False

    def _exchange(self, layout: UnitLayout, note: Callable[[UnitLayout], object]) -> None:
        """`note`: told when the unit is the other one. An interrupt may come at any place in here."""
        self._before_write(layout.unit.index)
        try:
            try:
                self._access.exchange_average(layout)
                note(layout)
            finally:
                self._after_write(layout.unit.index, True)
        except BaseException as error:
            self._exchanged = []
            self._spoilt(error)
            raise
