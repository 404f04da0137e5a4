"""Initialising a model that was built on the meta device: its modules' own initialisers, recorded and run per unit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn

from .adoption import DeferredValues
from .recipe import give_recipe, recipe_of, take_recipe
from .recorder import deferred_init

Initialiser = Callable[[nn.Module], object]


def initialised_values(module: nn.Module, init: Initialiser | None) -> DeferredValues:
    """Values of a module that was built on the meta device, as its initialisation will make them.

    Modules are initialised children first, as `nn.Module.apply` goes: a Hugging Face model by its `init_weights()`,
    every other module by its `reset_parameters()` (or torch's `_reset_parameters()`); or all of them by `init(module)`.
    That is the order of an eager build of modules that make their parameters last, as torch's own do; values are then
    those of the eager build under the same seed.

    Raises: ValueError naming parameters and buffers that were left without values.
    """
    wanted = _on_meta(module)
    fresh = []
    for tensor in wanted.values():
        if recipe_of(tensor) is None:
            give_recipe(tensor)
            fresh.append(tensor)
    try:
        with deferred_init(), torch.no_grad(), _untied(module):
            if init is not None:
                module.apply(init)  # type: ignore[arg-type]  # what it returns is not looked at
            else:
                _initialise(module, set())
        _refuse_unset(module, wanted, init)
        return DeferredValues(module)
    except BaseException:
        for tensor in fresh:
            take_recipe(tensor)
        raise


def _on_meta(module: nn.Module) -> dict[str, torch.Tensor]:
    named = (*module.named_parameters(), *module.named_buffers())
    return {name: tensor for name, tensor in named if tensor.device.type == "meta"}


@contextlib.contextmanager
def _untied(module: nn.Module) -> Iterator[None]:
    """A tied parameter gets what the module that holds it first gives it, as if the tie came afterwards."""
    seen: set[nn.Parameter] = set()
    tied = []
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is None:
                continue
            if parameter in seen:
                tied.append((part, name, parameter))
                part._parameters[name] = other = nn.Parameter(torch.empty_like(parameter, device="meta"))
                if recipe_of(other) is None:  # made before recording began
                    give_recipe(other)
            seen.add(parameter)
    try:
        yield
    finally:
        for part, name, parameter in tied:
            part._parameters[name] = parameter


def _initialise(module: nn.Module, done: set[nn.Module]) -> None:
    if module in done:
        return
    done.add(module)
    if callable(getattr(module, "_init_weights", None)) and callable(getattr(module, "init_weights", None)):
        module.init_weights()  # type: ignore[operator]  # goes through its own children
        return
    for child in module.children():
        _initialise(child, done)
    for method in ("reset_parameters", "_reset_parameters"):
        own = getattr(module, method, None)
        if callable(own):
            own()
            return


def _refuse_unset(module: nn.Module, wanted: dict[str, torch.Tensor], init: Initialiser | None) -> None:
    unset = [name for name, tensor in wanted.items() if not recipe_of(tensor).steps]  # type: ignore[union-attr]
    if not unset:
        return
    owner = module.get_submodule(unset[0].rpartition(".")[0])
    if init is None:
        why = f"{type(owner).__name__} has no reset_parameters() that sets it; give init=..., a function that does"
    else:
        why = f"init(...) on its {type(owner).__name__} did not set it; let it"
    raise ValueError(
        f"{unset[0]!r} is on the meta device and was left without values ({len(unset)} parameters and buffers in all): "
        f"{why}, or build the model inside `with offload.deferred_init():`"
    )
