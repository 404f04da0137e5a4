"""Taking a module over: its values go to their homes, and whoever calls it or looks into it meets the engine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from .access import ParameterAccess
from .assembly import Assembly
from .bindings import Bindings
from .calls import UnitForward
from .durable import CommitLog
from .guards import Guards, is_guarded
from .hostheap import trim_heap
from .layout import UnitLayout
from .runtime import CallRuntime
from .untraced import untraced
from .weights.progress import report_filling
from .weights.source import ValueSource

_CONTAINERS = (nn.ModuleList, nn.ModuleDict)  # nobody calls them


def is_taken_over(module: nn.Module) -> bool:
    """Whether an engine has taken over `module`, a part of it, or a parameter of it."""
    return any(isinstance(part.forward, (UnitForward, PassForward)) for part in module.modules()) or any(
        is_guarded(parameter) for parameter in module.parameters()
    )


class PassForward:
    """Stands in for the `forward` of the wrapped module and of every part of it that holds units: whoever calls one of
    them first begins a pass, as a call of the engine does.

    Args:
        begin: given the positional arguments, a context for the length of the pass.
    """

    def __init__(
        self,
        module: nn.Module,
        runtime: CallRuntime,
        begin: Callable[[tuple[Any, ...]], contextlib.AbstractContextManager[None]],
    ) -> None:
        self.original: Callable[..., Any] = module.forward
        self.__wrapped__ = self.original  # for `inspect.signature`
        self._runtime = runtime
        self._begin = begin

    @untraced
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._runtime.in_forward:
            return self.original(*args, **kwargs)
        with self._begin(args):
            return self.original(*args, **kwargs)


class Takeover:
    """What an engine does to the module that it wraps, and how that is undone when construction fails.

    Args:
        log: where the values come from that a resumed run goes on with; None: from the module.
    """

    def __init__(
        self,
        module: nn.Module,
        parts: Assembly,
        access: ParameterAccess,
        bindings: Bindings,
        runtime: CallRuntime,
        log: CommitLog | None,
    ) -> None:
        self._module = module
        self._parts = parts
        self._access = access
        self._bindings = bindings
        self._runtime = runtime
        self._log = log
        self._dtypes = {info.parameter: info.parameter.dtype for info in parts.parameters}
        self._guards: Guards | None = None

    def begin(
        self,
        source: ValueSource,
        show: Callable[[nn.Parameter], nn.Parameter],
        value: Callable[[nn.Parameter], Tensor],
        drop_gradients: Callable[[], None],
        begin_pass: Callable[[tuple[Any, ...]], contextlib.AbstractContextManager[None]],
    ) -> None:
        """Move all values to their homes, then put placeholders, hooks and guards in place. For the other arguments,
        see `Guards`.

        Args:
            source: what gives the values, unless the store does.
        """
        with report_filling(self._parts.config.progress, _filled_nbytes(self._parts.layouts)) as stored:
            for layout in self._parts.layouts:
                if self._log is not None:
                    self._log.restore_resting(layout.unit.index)
                else:
                    with source.unit(layout.unit) as read:
                        self._access.fill(layout, read, stored)
                for member in layout.members:
                    self._bindings.release(member.info.parameter)
                trim_heap()
        for part in self._module.modules():
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = buffer.to(self._parts.device.torch_device)
        self._guards = Guards(self._module, self._parts.parameters, show, value, drop_gradients)
        for site in self._parts.partition.call_sites:
            site.module.__dict__["forward"] = UnitForward(site, self._runtime)
        for part in self._holding_units():
            part.__dict__["forward"] = PassForward(part, self._runtime, begin_pass)
        self._runtime.attach(self._parts.parameters)

    def _holding_units(self) -> list[nn.Module]:
        """The wrapped module, and what is called on the way from it to the units."""
        sites = {site.module for site in self._parts.partition.call_sites}
        inside = {part for site in sites for part in site.modules()}
        return [
            part
            for part in self._module.modules()
            if part is self._module
            or (part not in inside and not sites.isdisjoint(part.modules()) and not isinstance(part, _CONTAINERS))
        ]

    def values_changed(self) -> None:
        """Parameters have other values than a moment ago."""
        assert self._guards is not None, "nobody has values before begin()"
        self._guards.values_changed()

    def undo(self, source: ValueSource) -> None:
        """The module gets back what was taken from it, as far as the store can still be read, and `source` cannot give
        it back itself."""
        if self._guards is not None:
            self._guards.remove()
        self._runtime.detach()
        for part in [*self._holding_units(), *(site.module for site in self._parts.partition.call_sites)]:
            part.__dict__.pop("forward", None)
        for layout in self._parts.layouts:
            mine = set(layout.by_parameter) - set(source.repeatable)
            taken = [p for p in layout.by_parameter if p in mine and self._bindings.is_released(p)]
            if taken and not self._parts.config.resume:
                for parameter, host in self._access.read(layout, taken, states=False).items():
                    self._bindings.restore(parameter, host.value.to(self._dtypes[parameter]))


def _filled_nbytes(layouts: Sequence[UnitLayout]) -> int:
    return sum(layout.nbytes(kind) for layout in layouts for kind in ("param", "frozen", "states"))
