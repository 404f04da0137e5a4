"""Real values for the user: gathering, editing, state dicts in and out."""

from __future__ import annotations

import contextlib
import fnmatch
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from .access import HostParameter, ParameterAccess
from .gradients import Gradients
from .layout import UnitLayout
from .loss_scale import LossScaling
from .step import Stepper
from .torch_states import TorchState
from .units import ParameterInfo
from .update import AVERAGE


class Values:
    """Brings parameters to the host and takes edits back, unit by unit.

    Args:
        stepper: knows the updates so far by trainable parameter, which edited values may set.
        scaling: what gradients are shown without.
        before_write: called with a unit's index before its values change (evicts copies, waits for commits).
        after_write: called with it when they have, and with whether forwards compute with other values now.
        spoilt: told when a write broke off that had begun, after which values are half the old and half the new.
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: Sequence[ParameterInfo],
        layouts: Sequence[UnitLayout],
        access: ParameterAccess,
        gradients: Gradients,
        stepper: Stepper,
        scaling: LossScaling,
        before_write: Callable[[int], None],
        after_write: Callable[[int, bool], None],
        spoilt: Callable[[BaseException], None],
    ) -> None:
        self._module = module
        self._infos = {info.parameter: info for info in parameters}
        self._layouts = layouts
        self._access = access
        self._gradients = gradients
        self._stepper = stepper
        self._counts = stepper.counts
        self._scaling = scaling
        self._before_write = before_write
        self._after_write = after_write
        self._spoilt = spoilt
        self._has_written = False
        self._full: dict[nn.Parameter, Tensor] | None = None

    @contextlib.contextmanager
    def gather(self, patterns: Sequence[str], write: bool) -> Iterator[dict[str, HostParameter]]:
        """See `OffloadEngine.gather`."""
        for pattern in patterns:
            if not any(self._matches(info, [pattern]) for info in self._infos.values()):
                example = next(iter(self._infos.values())).name
                raise KeyError(f"no parameter matches {pattern!r}; names look like {example!r}")
        self._gradients.wait()
        present = self._gradients.present()
        gathered: dict[str, HostParameter] = {}
        chosen: list[tuple[UnitLayout, dict[nn.Parameter, HostParameter]]] = []
        before: dict[nn.Parameter, int] = {}
        averages: dict[nn.Parameter, int] = {}
        for layout in self._layouts:
            wanted = [p for p in layout.by_parameter if self._matches(self._infos[p], patterns)]
            if wanted:
                values = self._read(layout, wanted, present)
                for parameter, value in values.items():
                    gathered.update(dict.fromkeys(self._infos[parameter].names, value))
                chosen.append((layout, values))
                if write:
                    before.update((parameter, _digest(value.value)) for parameter, value in values.items())
                    averages.update(self._digests_of_averages(values))
        yield gathered
        if write:
            for layout, values in chosen:
                self._check_fits(layout, values)
            with self._writing():
                after = {p: digest for _, values in chosen for p, digest in self._digests_of_averages(values).items()}
                if any(digest != averages.get(parameter, digest) for parameter, digest in after.items()):
                    self._begin_average()
                for layout, values in chosen:
                    edited = any(_digest(value.value) != before[parameter] for parameter, value in values.items())
                    self._write(layout, values, edited)
                self._gradients.forget_norms()

    def _digests_of_averages(self, values: Mapping[nn.Parameter, HostParameter]) -> dict[nn.Parameter, int]:
        """Of averages that have not begun: one that is edited begins all of them."""
        if self._stepper.average_begun:
            return {}
        return {p: _digest(host.states[AVERAGE]) for p, host in values.items() if AVERAGE in host.states}

    def _begin_average(self) -> None:
        """Store the weights as the averages that they stand for."""
        for layout in self._layouts:
            values = self._read(layout, [p for p in layout.by_parameter if p in self._counts], set())
            if values:
                self._write(layout, values, edited=False)
        self._stepper.average_begun = True

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Around the writes to all units that belong together: one that breaks off leaves values of two kinds."""
        self._has_written = False
        try:
            yield
        except BaseException as error:
            if self._has_written:
                self._spoilt(error)
            raise

    def _matches(self, info: ParameterInfo, patterns: Sequence[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for name in info.names for pattern in patterns)

    def _read(
        self, layout: UnitLayout, wanted: Sequence[nn.Parameter], grads: set[nn.Parameter]
    ) -> dict[nn.Parameter, HostParameter]:
        values = self._access.read(layout, wanted, states=True, grads=grads)
        for parameter, value in values.items():
            value.step = self._counts.get(parameter, 0)
            if value.grad is not None:
                value.grad.mul_(self._scaling.inverse)
            if AVERAGE in value.states and not self._stepper.average_begun:
                value.states[AVERAGE].copy_(value.value)  # until it begins it is the weights themselves
        return values

    def _write(self, layout: UnitLayout, values: dict[nn.Parameter, HostParameter], edited: bool) -> None:
        """`edited`: forwards from here on compute with other values, rather than only the next step."""
        self._before_write(layout.unit.index)
        try:
            for value in values.values():
                if value.grad is not None:
                    value.grad.div_(self._scaling.inverse)
            self._has_written = True
            self._access.write(layout, values)
            for parameter, value in values.items():
                if parameter in self._counts:
                    self._counts[parameter] = value.step
        finally:
            self._after_write(layout.unit.index, edited)

    def _check_fits(self, layout: UnitLayout, values: Mapping[nn.Parameter, HostParameter]) -> None:
        """Before anything is written. Raises: KeyError, ValueError."""
        for parameter, value in values.items():
            known = {*layout.state_names, *(slot.name for slot in layout.slots_of(parameter))}
            unknown = sorted(set(value.states) - known)
            if unknown:
                raise KeyError(
                    f"{value.name!r} was given the state {unknown[0]!r}; this run keeps {sorted(known) or 'none'}"
                )
            blank = self._access.blank(layout, parameter)
            found = {"value": value.value, **({} if value.grad is None else {"grad": value.grad}), **value.states}
            expected = {"value": blank.value, "grad": blank.value, **blank.states}
            for what, tensor in found.items():
                if tensor.shape != expected[what].shape:
                    raise ValueError(
                        f"{what} of {value.name!r} was given shape {tuple(tensor.shape)}, it is "
                        f"{tuple(expected[what].shape)}; edit it in place"
                    )

    def states(self) -> dict[nn.Parameter, HostParameter]:
        """All trainable parameters with their optimizer states."""
        states: dict[nn.Parameter, HostParameter] = {}
        for layout in self._layouts:
            states.update(self._read(layout, [p for p in layout.by_parameter if p in self._counts], set()))
        return states

    def write_states(self, states: Mapping[nn.Parameter, TorchState]) -> None:
        """Replace the optimizer states of these parameters, and their counts; kinds that torch lacks (an average) stay.

        Raises: ValueError for kinds and shapes that this run does not have; nothing is written then.
        """
        for layout in self._layouts:
            for parameter in layout.by_parameter:
                if parameter in states:
                    self._check_torch_state(self._access.blank(layout, parameter), states[parameter])
        with self._writing():
            for layout in self._layouts:
                values = self._read(layout, [p for p in layout.by_parameter if p in states], set())
                for parameter, host in values.items():
                    found = states[parameter]
                    host.step = found.step
                    for kind, state in host.states.items():
                        if kind in found.states:
                            state.copy_(found.states[kind])
                        elif kind == "step":
                            state.fill_(found.step)
                        elif kind != AVERAGE:
                            state.zero_()
                if values:
                    self._write(layout, values, edited=False)

    def _check_torch_state(self, host: HostParameter, found: TorchState) -> None:
        unknown = sorted(set(found.states) - set(host.states))
        lost = sorted(set(host.states) - set(found.states) - {AVERAGE, "step"}) if found.step else []
        if unknown or lost:
            raise ValueError(
                f"the states of {host.name!r} are {sorted(found.states)}, this run keeps {sorted(host.states)}; load a "
                "state dict of the same optimizer"
            )
        for kind, state in found.states.items():
            if state.shape != host.states[kind].shape:
                raise ValueError(
                    f"{kind} of {host.name!r} has shape {tuple(state.shape)} in the state dict and "
                    f"{tuple(host.states[kind].shape)} in this run; are the parameters in the same order?"
                )

    def state_dict(self, averaged: bool = False) -> dict[str, Tensor]:
        """The module's state dict with fp32 masters, or their averages in their place, read unit by unit."""
        full: dict[nn.Parameter, Tensor] = {}
        averaged = averaged and self._stepper.average_begun
        for layout in self._layouts:
            for parameter, host in self._access.read(layout, list(layout.by_parameter), states=averaged).items():
                full[parameter] = host.states.get(AVERAGE, host.value) if averaged else host.value
        self._full = full
        try:
            return dict(self._module.state_dict())
        finally:
            self._full = None

    def for_state_dict(self, parameter: nn.Parameter) -> Tensor:
        """What `module.state_dict()` shows: the compute dtype, or full precision inside `state_dict`."""
        if self._full is not None:
            return self._full[parameter]
        return self._access.read_compute(parameter).cpu()

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool) -> None:
        """See `OffloadEngine.load_state_dict`."""
        buffers = dict(self._module.named_buffers())
        self._check_fit(state_dict, buffers, strict)
        with self._writing(), torch.no_grad():
            for layout in self._layouts:
                chosen = {p: self._entry(self._infos[p], state_dict) for p in layout.by_parameter}
                values = self._read(layout, [p for p, value in chosen.items() if value is not None], set())
                for parameter, host in values.items():
                    host.value.copy_(chosen[parameter])  # type: ignore[arg-type]
                if values:
                    self._write(layout, values, edited=True)
            for name in set(buffers) & set(state_dict):
                buffers[name].copy_(state_dict[name])

    def _entry(self, info: ParameterInfo, state_dict: Mapping[str, Tensor]) -> Tensor | None:
        return next((state_dict[name] for name in info.names if name in state_dict), None)

    def _check_fit(self, state_dict: Mapping[str, Tensor], buffers: Mapping[str, Tensor], strict: bool) -> None:
        shapes = {name: info.shape for info in self._infos.values() for name in info.names}
        shapes.update({name: buffer.shape for name, buffer in buffers.items()})
        names = set(self._names_in_state_dict())
        missing, unexpected = sorted(names - set(state_dict)), sorted(set(state_dict) - names)
        if strict and (missing or unexpected):
            raise KeyError(
                f"state_dict does not fit: missing {missing[:5]} ({len(missing)} in all), unexpected {unexpected[:5]} "
                f"({len(unexpected)} in all); give the state dict of this model, or strict=False to load what fits"
            )
        for name, value in state_dict.items():
            if name in shapes and value.shape != shapes[name]:
                raise ValueError(
                    f"{name!r} has shape {tuple(value.shape)} in state_dict and {tuple(shapes[name])} in the model"
                )

    def _names_in_state_dict(self) -> Iterator[str]:
        for prefix, part in self._module.named_modules(remove_duplicate=False):
            dot = f"{prefix}." if prefix else ""
            yield from (dot + name for name, p in dict.items(part._parameters) if p is not None)
            yield from (dot + name for name, _ in persistent_buffers(part))


def _digest(value: Tensor) -> int:
    return zlib.crc32(value.contiguous().view(-1).view(torch.uint8).numpy().data) if value.numel() else 0


def persistent_buffers(part: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's own buffers that belong into a state dict."""
    hidden = part._non_persistent_buffers_set
    yield from ((name, b) for name, b in part._buffers.items() if b is not None and name not in hidden)
