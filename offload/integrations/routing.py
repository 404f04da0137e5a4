"""A wrapped module whose own calls go through its engine.

A trainer hands its model to code that calls it: `compute_loss`, callbacks, `generate`. That code keeps calling the
model, which stays an instance of its class, and each call becomes one of the engine.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..engine import OffloadEngine


def route_calls(engine: OffloadEngine) -> None:
    """From here on `engine.module(...)` means `engine(...)`.

    The module gets a class of its own, which has the name of the one it had and is a subclass of it.
    """
    module = engine.module
    kind = type(module)
    inside = False

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        if inside:  # the engine calls the module, or the module calls itself
            return kind.__call__(self, *args, **kwargs)
        inside = True
        try:
            return engine(*args, **kwargs)
        finally:
            inside = False

    names = {"__call__": call, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    module.__class__ = type(kind.__name__, (kind,), {**names, "_routed_class": kind})


def unroute_calls(module: nn.Module) -> None:
    """Give the module the class back that it had before `route_calls`; nothing, if it was not routed."""
    kind = type(module).__dict__.get("_routed_class")
    if kind is not None:
        module.__class__ = kind
