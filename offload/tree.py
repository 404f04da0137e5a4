"""Tensors in and out of whatever a module takes and returns: tuples, dicts, dataclasses, model outputs."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

Rebuild = Callable[[list[Any]], Any]
_SEARCH_DEPTH = 4


def flatten(value: Any, where: str, closed: Callable[[Any], bool] = lambda node: False) -> tuple[list[Any], Rebuild]:
    """The leaves of `value` and a function that rebuilds it from leaves.

    Containers that torch knows (Hugging Face's outputs register themselves) and plain dataclasses are opened, unless
    `closed` says that they are one leaf. Any other object is one leaf; if it carries a tensor that needs a gradient,
    the gradient would be lost.

    Raises: TypeError for such an object; `where` says whose argument or result it is.
    """
    leaves, spec = tree_flatten(value, is_leaf=closed)
    flat: list[Any] = []
    rebuilders: list[tuple[int, Rebuild | None]] = []
    for leaf in leaves:
        if closed(leaf):
            rebuilders.append((1, None))
            flat.append(leaf)
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, (type, Tensor)):
            inner, rebuild = _flatten_dataclass(leaf, where, closed)
            rebuilders.append((len(inner), rebuild))
            flat += inner
        else:
            refuse_hidden_gradient(leaf, where)
            rebuilders.append((1, None))
            flat.append(leaf)

    def rebuild_all(values: list[Any]) -> Any:
        taken = iter(values)
        outer = []
        for count, rebuild in rebuilders:
            inner_values = [next(taken) for _ in range(count)]
            outer.append(inner_values[0] if rebuild is None else rebuild(inner_values))
        return tree_unflatten(outer, spec)

    return flat, rebuild_all


def _flatten_dataclass(value: Any, where: str, closed: Callable[[Any], bool]) -> tuple[list[Any], Rebuild]:
    names = [field.name for field in dataclasses.fields(value)]
    leaves, rebuild = flatten(tuple(getattr(value, name) for name in names), where, closed)

    def rebuild_dataclass(values: list[Any]) -> Any:
        twin = copy.copy(value)
        for name, item in zip(names, rebuild(values), strict=True):
            object.__setattr__(twin, name, item)
        return twin

    return leaves, rebuild_dataclass


def refuse_hidden_gradient(leaf: Any, where: str) -> None:
    """Raises: TypeError if an object that is no tensor carries one that needs a gradient."""
    if isinstance(leaf, Tensor) or not _carries_gradient(leaf, _SEARCH_DEPTH):
        return
    raise TypeError(
        f"{where} passes a {type(leaf).__name__} that carries a tensor which needs a gradient; units exchange "
        "gradients through tensors, tuples, lists, dicts and attributes of plain objects: pass the tensor itself, or "
        "register the class with torch.utils._pytree.register_pytree_node"
    )


def _carries_gradient(value: Any, depth: int) -> bool:
    """Whether a tensor that needs a gradient is found in `value` within `depth` containers or attributes."""
    if isinstance(value, Tensor):
        return value.requires_grad
    if depth == 0 or isinstance(value, (str, bytes, int, float, type, torch.nn.Module)) or value is None:
        return False
    if isinstance(value, Mapping):
        items = list(value.values())
    elif isinstance(value, (list, tuple, set, frozenset)):
        items = list(value)
    else:
        items = []
    items += list(getattr(value, "__dict__", {}).values())
    items += [getattr(value, name, None) for name in getattr(type(value), "__slots__", ()) if name != "__weakref__"]
    return any(_carries_gradient(item, depth - 1) for item in items)


def tensors_of(leaves: list[Any]) -> list[Tensor]:
    """The tensors among `leaves`, in order."""
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def with_tensors(leaves: list[Any], tensors: list[Any]) -> list[Any]:
    """`leaves` with its tensors replaced, in order, by `tensors`."""
    fresh = iter(tensors)
    return [next(fresh) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
