"""Meta parameters become, object for object, parameters on the CPU that take no memory, which an engine can fill."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from ..units import ParameterInfo, Unit
from .recipe import Place, Recipe, make, recipe_of, values_of, was_left_alone
from .source import ModuleValues, Reader, ValueSource


class DeferredValues:
    """Values of parameters that were never made, from what `deferred_init` recorded; others from the module itself.

    The module's parameters stay the same objects, so ties and references hold. Whatever else of it is deferred (tensors
    that modules keep as plain attributes) is made now.

    Attributes:
        names: of parameters on the meta device.
        without_values: parameters on the meta device of which nothing was recorded, by name.

    Raises: ValueError naming parameters that share deferred memory, or buffers without values.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._places: dict[nn.Parameter, Place] = {}
        self._meta: list[tuple[nn.Parameter, nn.Parameter]] = []
        self.names = {p: name for name, p in module.named_parameters() if p.device.type == "meta"}
        self.without_values = [name for p, name in self.names.items() if recipe_of(p) is None]
        _refuse_shared(self.names)
        _refuse_empty_buffers(module)

    def begin(self) -> None:
        """Raises: ValueError naming a parameter that cannot be taken over."""
        _make_buffers(self._module)
        changed = [name for parameter, name in self.names.items() if not was_left_alone(parameter)]
        if changed:
            raise ValueError(
                f"parameter {changed[0]!r} was changed after `with deferred_init():` had ended ({len(changed)} such "
                "parameters), where nothing is recorded, so the change would be lost; make it inside the block, or "
                "load weights with OffloadEngine.from_pretrained or engine.load_state_dict"
            )
        for parameter, name in self.names.items():
            recipe = recipe_of(parameter)
            if recipe is not None:
                self._places[parameter] = Place.of(parameter, recipe)
            self._meta.append((parameter, _swap(parameter, name)))

    @property
    def repeatable(self) -> Collection[nn.Parameter]:
        return {parameter for parameter, _ in self._meta}

    @contextlib.contextmanager
    def unit(self, unit: Unit) -> Iterator[Reader]:
        with ModuleValues().unit(unit) as own:

            def read(info: ParameterInfo) -> Tensor:
                place = self._places.get(info.parameter)
                return own(info) if place is None else make(place)

            yield read

    def give_back(self) -> None:
        for parameter, meta in reversed(self._meta):
            _exchange(parameter, meta)
        self._meta.clear()


@contextlib.contextmanager
def first_values(module: nn.Module, source: ValueSource | None) -> Iterator[ValueSource]:
    """`source`, or where the values of `module` come from when nobody says otherwise; given back if the body fails.

    Raises: ValueError naming a parameter on the meta device that has no values and no record of how to make them.
    """
    if source is None:
        source = _own_values(module)
    try:
        source.begin()
        yield source
    except BaseException:
        source.give_back()
        raise


def _own_values(module: nn.Module) -> ValueSource:
    if all(parameter.device.type != "meta" for parameter in module.parameters()):
        return ModuleValues()
    values = DeferredValues(module)
    unset = [name for p, name in values.names.items() if (r := recipe_of(p)) is not None and not r.steps]
    if unset:
        warnings.warn(
            f"{len(unset)} parameters were left without values when the model was built: [{', '.join(unset[:8])}]"
            f"{' ...' if len(unset) > 8 else ''}; they are zeros",
            stacklevel=5,
        )
    if values.without_values:
        raise ValueError(
            f"parameter {values.without_values[0]!r} is on the meta device and has no values "
            f"({len(values.without_values)} such parameters); build the model inside `with offload.deferred_init():` "
            "and change it nowhere else, or give it to OffloadEngine.from_meta, which initialises it, or to "
            "OffloadEngine.from_pretrained(..., module=model)"
        )
    return values


def _refuse_empty_buffers(module: nn.Module) -> None:
    for name, buffer in module.named_buffers():
        if buffer.device.type == "meta" and recipe_of(buffer) is None:
            raise ValueError(
                f"buffer {name!r} is on the meta device and has no values, and nothing sets it; build the model inside "
                "`with offload.deferred_init():` instead, where buffers are real"
            )


def _make_buffers(module: nn.Module) -> None:
    """Make what is deferred and no parameter: buffers, and tensors that modules keep as plain attributes."""
    for part in module.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None and recipe_of(buffer) is not None:
                part._buffers[name] = values_of(buffer)
        for name, value in list(part.__dict__.items()):
            if type(value) is Tensor and recipe_of(value) is not None:
                part.__dict__[name] = values_of(value)


def _refuse_shared(found: dict[nn.Parameter, str]) -> None:
    owners: dict[Recipe, str] = {}
    for parameter, name in found.items():
        recipe = recipe_of(parameter)
        if recipe is not None and owners.setdefault(recipe, name) != name:
            raise ValueError(
                f"parameters {owners[recipe]!r} and {name!r} are different objects over the same memory; tie them by "
                "assigning the same nn.Parameter to both modules, or clone one of them"
            )


def _swap(parameter: nn.Parameter, name: str) -> nn.Parameter:
    """Make `parameter` show one element, repeated, on the CPU; returns a parameter that holds what it was.

    The objects stay and only what they hold is exchanged, so their attributes and weak references (recurrent modules
    keep some) stay good; `torch.utils.swap_tensors` would exchange the former and refuses the latter.
    """
    shown = torch.empty(1, dtype=parameter.dtype).reshape(()).expand(parameter.shape)
    if not parameter.numel():
        shown = torch.empty(parameter.shape, dtype=parameter.dtype)
    other = nn.Parameter(shown, requires_grad=parameter.requires_grad)
    try:
        _exchange(parameter, other)
    except RuntimeError as error:
        raise ValueError(
            f"parameter {name!r} is on the meta device and cannot be filled in place ({error}); let go of the graphs "
            "that it is part of, or build the model with real values"
        ) from error
    return other


def _exchange(one: nn.Parameter, other: nn.Parameter) -> None:
    torch._C._swap_tensor_impl(one, other)
