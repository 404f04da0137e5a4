"""What a parameter shows at any moment: its placeholder, the staged unit it computes from, or a private copy.

A private copy serves whoever reads a released parameter outside of a call that holds its unit: the parent's forward
(`F.linear(x, self.embed.weight)`), a loss, or somebody curious. It is ordinary memory, so autograd may keep views
of it; it lasts until the step (or the forward, without gradients) ends.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .placeholders import Placeholder, PlaceholderOverwritten
from .staged import Staged
from .units import ParameterInfo


class Bindings:
    """Moves parameters between the three.

    Args:
        read: returns a fresh tensor of a released parameter's values, in its compute dtype, on the compute device.
    """

    def __init__(
        self, parameters: Sequence[ParameterInfo], device: torch.device, read: Callable[[nn.Parameter], Tensor]
    ) -> None:
        self._read = read
        self._lock = threading.RLock()
        self._info = {info.parameter: info for info in parameters}
        self._placeholder = {
            info.parameter: Placeholder(info.name, info.parameter, info.dtype, device) for info in parameters
        }
        self._stateless = frozenset(info.parameter for info in parameters if not info.trainable)
        self._binds: dict[nn.Parameter, set[object]] = {}
        self._private: dict[nn.Parameter, tuple[int, int] | None] = {}
        self._for_graph: set[nn.Parameter] = set()
        self._closed = False

    def release(self, parameter: nn.Parameter) -> None:
        self._placeholder[parameter].install()

    def bind(self, staged: Sequence[Staged], holder: object) -> None:
        """Show staged values until `holder` unbinds them. Private copies stay: autograd may have saved them.

        Raises: PlaceholderOverwritten if a parameter was written to while it was released; RuntimeError for one that
            needs a gradient and has no states. Nothing is bound then.
        """
        with self._lock, torch.inference_mode(False):
            for one in staged:
                for parameter in one.views:
                    self._refuse_unfrozen(parameter)
                    if not self._binds.get(parameter) and parameter not in self._private:
                        self._placeholder[parameter].check()
            for one in staged:
                for parameter, view in one.views.items():
                    holders = self._binds.setdefault(parameter, set())
                    holders.add(holder)
                    if len(holders) == 1 and parameter not in self._private:
                        parameter.data = view

    def unbind(self, staged: Sequence[Staged], holder: object) -> None:
        """Undo a `bind` of `holder`, also one that was broken off. Twice is safe, so whoever was interrupted here
        does it again."""
        with self._lock:
            for one in staged:
                for parameter in one.views:
                    holders = self._binds.get(parameter, set())
                    holders.discard(holder)
                    if not holders and parameter not in self._private:
                        self._placeholder[parameter].install()

    def _refuse_unfrozen(self, parameter: nn.Parameter) -> None:
        if parameter.requires_grad and parameter in self._stateless:
            name = self._info[parameter].name
            raise RuntimeError(
                f"parameter {name!r} was frozen when the engine was built, so it has no optimizer states, and now it "
                f"has requires_grad=True; build the engine with OffloadConfig(trainable=[{name!r}]), which reserves "
                "states for parameters that start frozen, or freeze it again with requires_grad_(False)"
            )

    def show(self, parameter: nn.Parameter, outside_of_forward: bool) -> nn.Parameter:
        """The parameter with real values, however it was found.

        Args:
            outside_of_forward: nobody computes just now, so an edit by hand is possible and will be looked for.
        """
        if torch.is_grad_enabled() and parameter in self._placeholder:
            if not outside_of_forward:
                self._refuse_unfrozen(parameter)
            self._for_graph.add(parameter)
        if self._binds.get(parameter) or parameter in self._private or parameter not in self._placeholder:
            return parameter
        if self._closed:
            raise RuntimeError(
                f"parameter {self._info[parameter].name!r} was read after engine.close(); its values are no longer "
                "at hand: take engine.state_dict() before closing"
            )
        with self._lock:
            self._placeholder[parameter].check()
            values = self._read(parameter)
            self._private[parameter] = _fingerprint(values) if outside_of_forward else None
            with torch.inference_mode(False):
                parameter.data = values
        return parameter

    def placeholder(self, parameter: nn.Parameter) -> Tensor:
        return self._placeholder[parameter].tensor

    def is_private(self, parameter: nn.Parameter) -> bool:
        return parameter in self._private

    @property
    def private_nbytes(self) -> int:
        return sum(parameter.nbytes for parameter in list(self._private))

    def drop_private(self, keep_for_graphs: bool = False) -> None:
        """Let go of private copies: all, or those that no graph can hold because they were read without gradients.

        A graph saves the parameter itself and not its data, so its copy must stay until its backward is over. A
        backward that comes later all the same is told by the parameter's version, as behind a step in torch.

        Raises: PlaceholderOverwritten if one that was read outside of a forward was edited: the edit would be lost.
        """
        edited = []
        with self._lock:
            kept = {p: f for p, f in self._private.items() if keep_for_graphs and p in self._for_graph}
            private = {p: f for p, f in self._private.items() if p not in kept}
            old_in_graphs = [parameter for parameter in private if parameter in self._for_graph]
            self._private = kept
            self._for_graph = set(kept)
            for parameter, fingerprint in private.items():
                if not self._binds.get(parameter):
                    if _is_edited(parameter.data, fingerprint):
                        edited.append(parameter)
                    self._placeholder[parameter].install()
            if old_in_graphs:
                torch.autograd.graph.increment_version(old_in_graphs)
        self._refuse_edits(edited)

    def look_for_edits(self) -> None:
        """Raises: PlaceholderOverwritten as `drop_private`; the copies stay, so that it is raised again."""
        with self._lock:
            self._refuse_edits([p for p, seen in self._private.items() if _is_edited(p.data, seen)])

    def _refuse_edits(self, edited: Sequence[nn.Parameter]) -> None:
        if edited:
            names = [self._info[parameter].name for parameter in edited]
            raise PlaceholderOverwritten(
                f"{' and '.join(map(repr, names))} was edited in place, but the values live in the engine, so the "
                f"edit would be lost; edit inside `with engine.gather({names[0]!r}, write=True) as parameters:`"
            )

    def close(self) -> None:
        self._closed = True

    def is_released(self, parameter: nn.Parameter) -> bool:
        """Whether the parameter shows its placeholder."""
        return parameter.data_ptr() == self._placeholder[parameter].tensor.data_ptr() and parameter.numel() > 0

    def restore(self, parameter: nn.Parameter, values: Tensor) -> None:
        """Give a parameter real values for good: the engine lets go of it."""
        with torch.inference_mode(False):
            parameter.data = values


def _fingerprint(values: Tensor) -> tuple[int, int] | None:
    """Address and checksum of a host tensor; None where looking would copy from a device."""
    if values.device.type != "cpu" or not values.numel():
        return None
    return values.data_ptr(), zlib.crc32(values.view(-1).view(torch.uint8).numpy().data)


def _is_edited(values: Tensor, fingerprint: tuple[int, int] | None) -> bool:
    return fingerprint is not None and _fingerprint(values) != fingerprint


class ReleasedParameters(dict[str, nn.Parameter | None]):
    """Stands in for a module's `_parameters`: looking a parameter up gives real values.

    Iterating over it (as `parameters()` and `named_parameters()` do) gives the same objects without fetching. Which
    parameters there are is fixed: the engine would know nothing of another one.
    """

    def __init__(self, original: dict[str, nn.Parameter | None], show: Callable[[nn.Parameter], nn.Parameter]) -> None:
        super().__init__(original)
        self._show = show

    def __getitem__(self, name: str) -> nn.Parameter | None:
        parameter = super().__getitem__(name)
        return None if parameter is None else self._show(parameter)

    def __setitem__(self, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not self.get(name):
            self._refuse(name)
        super().__setitem__(name, parameter)

    def __delitem__(self, name: str) -> None:
        self._refuse(name)

    def pop(self, name: str, *default: Any) -> Any:
        if name in self:
            self._refuse(name)
        return super().pop(name, *default)

    def _refuse(self, name: str) -> NoReturn:
        raise RuntimeError(
            f"parameter {name!r} of a wrapped module is replaced, added or removed (torch.func.functional_call does "
            "so too), but its values, gradient and states live in the engine; change values inside "
            "`with engine.gather(..., write=True)`, or change the module first and wrap it then"
        )

    def __reduce__(self) -> tuple[type[dict[str, nn.Parameter | None]], tuple[dict[str, nn.Parameter | None]]]:
        return dict, (dict(self),)
