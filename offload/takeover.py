"""Taking a module over: its values go to their homes, and whoever calls it or looks into it meets the engine."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from .access import ParameterAccess
from .assembly import Assembly
from .bindings import Bindings
from .calls import UnitForward
from .durable import CommitLog
from .guards import Guards
from .hostheap import trim_heap
from .runtime import CallRuntime


def is_taken_over(module: nn.Module) -> bool:
    """Whether an engine has taken over `module` or a part of it."""
    return any(isinstance(part.forward, UnitForward) for part in module.modules())


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
        show: Callable[[nn.Parameter], nn.Parameter],
        value: Callable[[nn.Parameter], Tensor],
        drop_gradients: Callable[[], None],
    ) -> None:
        """Move all values to their homes, then put placeholders, hooks and guards in place. For the arguments, see
        `Guards`."""
        for layout in self._parts.layouts:
            if self._log is not None:
                self._log.restore_resting(layout.unit.index)
            else:
                self._access.fill(layout)
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
        self._runtime.attach(self._parts.parameters)

    def values_changed(self) -> None:
        """Parameters have other values than a moment ago."""
        assert self._guards is not None, "nobody has values before begin()"
        self._guards.values_changed()

    def undo(self) -> None:
        """The module gets back what was taken from it, as far as the store can still be read."""
        if self._guards is not None:
            self._guards.remove()
        self._runtime.detach()
        for site in self._parts.partition.call_sites:
            site.module.__dict__.pop("forward", None)
        for layout in self._parts.layouts:
            taken = [p for p in layout.by_parameter if self._bindings.is_released(p)]
            if taken and not self._parts.config.resume:
                for parameter, host in self._access.read(layout, taken, states=False).items():
                    self._bindings.restore(parameter, host.value.to(self._dtypes[parameter]))
