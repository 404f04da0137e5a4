"""A unit on the device."""

from __future__ import annotations

from torch import Tensor, nn

from .layout import UnitLayout
from .scheduler.devices import Event
from .scheduler.pool import Lease


class Staged:
    """One unit on the device. `holds` counts who uses it; `last_use` is the compute event of the last use.

    `buffer` (uint8 [staged_nbytes]) lies in `lease`, or is where the unit rests in host memory (`lease` is None then);
    `views` are the parameters' values in it.
    """

    __slots__ = ("buffer", "holds", "last_use", "lease", "views")

    def __init__(self, layout: UnitLayout, buffer: Tensor, lease: Lease | None) -> None:
        self.buffer = buffer
        self.lease = lease
        self.views: dict[nn.Parameter, Tensor] = layout.param_views(buffer)
        self.holds = 0
        self.last_use: Event | None = None
