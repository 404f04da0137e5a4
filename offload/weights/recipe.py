"""How the bytes of a tensor come about, kept instead of the bytes: recorded operations, run again when they are wanted.

[Note: storages, not tensors] A deferred tensor is a plain tensor on the meta device. Its storage holds no bytes, but it
is one object that all views of it share, and a view's geometry on it is exact. So a recipe belongs to a storage, views
need no record at all, and an operand is a geometry over a storage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

_ATTRIBUTE = "_offload_recipe"


@dataclass(eq=False, slots=True)
class Recipe:
    """What was done to one storage of `nbytes`, in order. `is_read`: a step that writes elsewhere reads it. `version`:
    of the parameter over it when recording ended; another one says that it was changed where nobody recorded."""

    nbytes: int
    version: int | None = field(default=None, kw_only=True)
    steps: list[Step] = field(default_factory=list)
    is_read: bool = False


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor over a storage that has a recipe. `offset` and strides count elements."""

    recipe: Recipe
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @staticmethod
    def of(tensor: Tensor, recipe: Recipe) -> Place:
        return Place(recipe, tensor.dtype, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))

    @property
    def covers_all(self) -> bool:
        """Whether every byte of the storage belongs to exactly one element."""
        expected = 1
        for stride, size in sorted((s, n) for s, n in zip(self.stride, self.size, strict=True) if n != 1):
            if stride != expected:
                return False
            expected *= size
        return math.prod(self.size) * self.dtype.itemsize == self.recipe.nbytes


@dataclass(frozen=True, eq=False, slots=True)
class Held:
    """A real tensor that a step reads: a copy, or the tensor itself with its version, where it is large."""

    tensor: Tensor
    version: int | None

    def get(self) -> Tensor:
        """Raises: RuntimeError if a large one was changed since."""
        if self.version is not None and self.tensor._version != self.version:
            raise RuntimeError(
                f"a tensor of {self.tensor.nbytes} bytes that went into a deferred initialisation has been changed "
                "since; give the model a clone of it"
            )
        return self.tensor


@dataclass(frozen=True, eq=False, slots=True)
class Step:
    """One operation. Deferred operands are `Place`s, real ones `Held`.

    Args:
        writes: the recipes whose storage it changes or makes.
        made: where each tensor that it returns lies; None for one that is no new tensor.
        overwrites: it leaves nothing of what was in the only storage it writes to.
        state: the generator's state before it, for one that draws random numbers; None draws from where it stands.
    """

    index: int
    func: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    reads: Sequence[Recipe]
    writes: Sequence[Recipe]
    made: Sequence[Place | None]
    overwrites: bool
    state: Tensor | None


def recipe_of(tensor: Tensor) -> Recipe | None:
    """The recipe of a deferred tensor's storage; None for every other tensor."""
    if tensor.layout is not torch.strided:
        return None
    return getattr(tensor.untyped_storage(), _ATTRIBUTE, None)


def note_version(parameter: Tensor) -> bool:
    """Recording ends, and the parameter is as it was recorded. Returns whether it is a deferred one."""
    recipe = recipe_of(parameter)
    if recipe is not None:
        recipe.version = parameter._version
    return recipe is not None


def was_left_alone(parameter: Tensor) -> bool:
    """Whether nothing has been done to a deferred parameter in place since recording ended."""
    recipe = recipe_of(parameter)
    return recipe is None or recipe.version in (None, parameter._version)


def give_recipe(tensor: Tensor) -> Recipe:
    """A fresh recipe for a meta tensor's storage, which keeps it for as long as it lives."""
    storage = tensor.untyped_storage()
    recipe = Recipe(storage.nbytes())
    setattr(storage, _ATTRIBUTE, recipe)
    return recipe


def take_recipe(tensor: Tensor) -> None:
    """Forget a meta tensor's recipe."""
    delattr(tensor.untyped_storage(), _ATTRIBUTE)


def values_of(tensor: Tensor) -> Tensor:
    """The values of a deferred tensor, made now, in memory of their own. Its bytes are those of an eager build."""
    recipe = recipe_of(tensor)
    assert recipe is not None
    return make(Place.of(tensor, recipe))


def make(place: Place) -> Tensor:
    """The values at a place, made by running all steps that they depend on, in their order."""
    steps: dict[int, Step] = {}
    _collect(place.recipe, steps)
    storages: dict[Recipe, torch.UntypedStorage] = {}
    with torch.no_grad():
        for _, step in sorted(steps.items()):
            _run(step, storages)
        return _tensor_at(place, storages)


def _collect(recipe: Recipe, steps: dict[int, Step]) -> None:
    """Add the steps that the last bytes of a storage depend on."""
    waiting: list[tuple[Recipe, float]] = [(recipe, math.inf)]
    seen: set[tuple[Recipe, float]] = set()
    while waiting:
        wanted = waiting.pop()
        if wanted in seen:
            continue
        seen.add(wanted)
        recipe, before = wanted  # its bytes as they were just before that step
        for step in reversed(recipe.steps):
            if step.index >= before:
                continue
            if step.index not in steps:
                steps[step.index] = step
                waiting += [(read, step.index) for read in step.reads if read is not recipe]
            if step.overwrites:
                break


def _run(step: Step, storages: dict[Recipe, torch.UntypedStorage]) -> None:
    args, kwargs = tree_map_only(
        (Place, Held),
        lambda operand: operand.get() if isinstance(operand, Held) else _tensor_at(operand, storages),
        (tuple(step.args), dict(step.kwargs)),
    )
    if step.state is None:
        result = step.func(*args, **kwargs)
    else:
        generator = kwargs.get("generator") or torch.default_generator
        now = generator.get_state()
        generator.set_state(step.state)
        try:
            result = step.func(*args, **kwargs)
        finally:
            generator.set_state(now)
    for place, tensor in zip(step.made, flat_tensors(result), strict=True):
        if place is not None:
            # The recorded geometry is the meta kernel's; a view of it later on must find the same bytes.
            same = tensor.stride() == place.stride and tensor.storage_offset() == place.offset
            if same and tensor.untyped_storage().nbytes() == place.recipe.nbytes:
                storages[place.recipe] = tensor.untyped_storage()
            else:
                _tensor_at(place, storages).copy_(tensor)


def _tensor_at(place: Place, storages: dict[Recipe, torch.UntypedStorage]) -> Tensor:
    storage = storages.get(place.recipe)
    if storage is None:  # memory that nothing has been written to; zeros cost nothing and are always the same
        storage = torch.zeros(place.recipe.nbytes, dtype=torch.uint8).untyped_storage()
        storages[place.recipe] = storage
    return torch.empty(0, dtype=place.dtype).set_(storage, place.offset, place.size, place.stride)


def flat_tensors(result: Any) -> list[Tensor]:
    """The tensors that an operation returned."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, (tuple, list)):
        return [tensor for tensor in result if isinstance(tensor, Tensor)]
    return []
