"""Where a unit's first values come from: one parameter at a time, each let go of once it is stored."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor, nn

from ..units import ParameterInfo, Unit

Reader = Callable[[ParameterInfo], Tensor]
"""Gives one parameter's values: [shape], in any float dtype where the parameter is one of floats, else in its own."""


class ValueSource(Protocol):
    """Where first values come from.

    Attributes:
        repeatable: parameters whose values it can give again, so that nobody needs to bring them back when construction
            fails.
    """

    @property
    def repeatable(self) -> Collection[nn.Parameter]: ...

    def begin(self) -> None:
        """Construction begins: from here on every parameter is a tensor whose `data` can be replaced.

        Raises: ValueError, with nothing changed.
        """
        ...

    def unit(self, unit: Unit) -> AbstractContextManager[Reader]:
        """Opens one unit. What it holds for the unit's sake (files, maps) is given back at the end."""
        ...

    def give_back(self) -> None:
        """Construction failed: the module becomes again what it was."""
        ...


class ModuleValues:
    """The module's own tensors."""

    repeatable: Collection[nn.Parameter] = ()

    def begin(self) -> None:
        """They are what they are."""

    @contextlib.contextmanager
    def unit(self, unit: Unit) -> Iterator[Reader]:
        yield lambda info: info.parameter.detach().cpu()

    def give_back(self) -> None:
        """Nothing was taken."""
