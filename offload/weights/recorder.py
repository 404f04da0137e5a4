"""`deferred_init`: a model is built as always, but its parameters take no memory until their unit is filled."""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only

from .draws import draw, is_drawn_in_order
from .recipe import (
    Held,
    Place,
    Step,
    flat_tensors,
    give_recipe,
    note_version,
    recipe_of,
    values_of,
    was_left_alone,
)

_aten = torch.ops.aten
_SMALL_NBYTES = 16 << 10  # up to here a tensor is made at once: it costs nothing, and code that reads it just works
_COPIED_NBYTES = 1 << 20
_OVERWRITES = {
    _aten.normal_.default,
    _aten.uniform_.default,
    _aten.random_.default,
    _aten.random_.to,
    getattr(_aten.random_, "from"),
    _aten.exponential_.default,
    _aten.log_normal_.default,
    _aten.cauchy_.default,
    _aten.geometric_.default,
    _aten.bernoulli_.float,
    _aten.fill_.Scalar,
    _aten.fill_.Tensor,
    _aten.zero_.default,
    _aten.copy_.default,
}
_REBINDS = {getattr(_aten.set_, name) for name in _aten.set_.overloads()}
_EMPTIES = {
    _aten.empty.memory_format,
    _aten.empty_strided.default,
    _aten.empty_like.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
}
_READERS = {"numpy", "tolist", "__array__", "item", "__repr__", "__format__", "__reduce_ex__"}
_step_numbers = itertools.count()


_deferred: list[weakref.ref[nn.Parameter]] = []
"""Parameters whose operations have been recorded and that are still there."""


def _alive() -> list[nn.Parameter]:
    found = [parameter for one in _deferred if (parameter := one()) is not None and recipe_of(parameter) is not None]
    _deferred.clear()
    return found


@contextlib.contextmanager
def deferred_init(*, seeded: bool = True) -> Iterator[None]:
    """Build a model inside without the memory of its parameters; `OffloadEngine(model, ...)` makes them unit by unit.

    Every operation on a large tensor is recorded instead of run, with the state of the random generator before it, and
    run when the unit is filled. The values are those of an eager build under the same seed, bit for bit, and afterwards
    the generators stand where an eager build would leave them. Buffers, and tensors of at most 16 KiB, are real. What
    looks at values (`item()`, `tolist()`, a comparison in an `if`) gets them, made for the moment.

    Outside, parameters are on the meta device until an engine takes the model. Change them inside: what is done to them
    afterwards, such as `.to(dtype)` or `load_state_dict`, is not seen, and the engine refuses such a parameter by name
    (all but changes through `.data`, of which torch leaves no trace).

    Args:
        seeded: whether random numbers are drawn as the model is built, so that the generators move on as in an eager
            build. Without, building is fast: for a model whose weights come from files. What the files lack is then
            drawn when its unit is filled.
    """
    recorder = _Recorder(seeded)
    parameters = [p for p in _alive() if was_left_alone(p)]  # of an earlier block: what this one does to them is seen
    hooks = [
        register_module_buffer_registration_hook(recorder.make_buffer),  # type: ignore[arg-type]
        register_module_parameter_registration_hook(lambda _, __, one: parameters.append(one)),
    ]
    try:
        with _Answers(recorder), recorder:
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in parameters:
            if parameter is not None and note_version(parameter):
                _deferred.append(weakref.ref(parameter))


class _Recorder(TorchDispatchMode):
    """Runs operations on small and on given tensors, and records those whose result is large or deferred."""

    def __init__(self, seeded: bool) -> None:
        super().__init__()
        self._seeded = seeded
        self.paused = False

    def make_buffer(self, module: nn.Module, name: str, buffer: Tensor | None) -> Tensor | None:
        """A buffer is real from the moment it belongs to a module."""
        if buffer is None or recipe_of(buffer) is None:
            return None
        return self.make(buffer)

    def make(self, tensor: Tensor) -> Tensor:
        """A deferred tensor's values, for now."""
        before, self.paused = self.paused, True
        try:
            return values_of(tensor)
        finally:
            self.paused = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        tensors = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, Tensor)]
        deferred = any(recipe_of(tensor) is not None for tensor in tensors)
        if not deferred and not _may_be_deferred(func, tensors, kwargs):
            return func(*args, **kwargs)
        written = _written(func, args, kwargs)
        if deferred and (
            _needs_values(func) or not _is_host(kwargs.get("device")) or any(recipe_of(one) is None for one in written)
        ):
            real_args, options = self._real((args, kwargs))
            return func(*real_args, **options)
        if not tensors:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        random = torch.Tag.nondeterministic_seeded in func.tags
        try:
            result = self._shape(func, args, kwargs)
        except NotImplementedError:  # torch does not know its shapes beforehand
            if written:
                raise RuntimeError(
                    f"{func} on a deferred tensor cannot be recorded; do it on a clone and copy_() the result back"
                ) from None
            real_args, options = self._real((args, kwargs))
            return func(*real_args, **options)
        if not deferred and sum(tensor.nbytes for tensor in flat_tensors(result)) <= _SMALL_NBYTES:
            return func(*args, **kwargs)
        if func in _REBINDS:
            return result  # no bytes move
        if func in _EMPTIES:  # nothing to run: what nobody sets is zeros, and the engine says so
            for tensor in flat_tensors(result):
                give_recipe(tensor)
            return result
        state = (kwargs.get("generator") or torch.default_generator).get_state() if random and self._seeded else None
        self._record(func, args, kwargs, written, result, state)
        if state is not None:
            self._draw(func, args, kwargs)
        return result

    def _shape(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What the operation does to shapes: itself, on the meta device. In-place ones return their argument."""
        shadow = tree_map_only(Tensor, lambda t: t if recipe_of(t) is not None else _meta_like(t), (args, kwargs))
        if "device" in shadow[1]:
            shadow[1]["device"] = torch.device("meta")
        shadow[1].pop("pin_memory", None)
        return func(*shadow[0], **shadow[1])

    def _record(
        self, func: Any, args: Any, kwargs: Any, written: Sequence[Tensor], result: Any, state: Tensor | None
    ) -> None:
        operands = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, Tensor)]
        reads = list(dict.fromkeys(r for t in operands if (r := recipe_of(t)) is not None))
        made: list[Place | None] = []
        writes = list(dict.fromkeys(r for t in written if (r := recipe_of(t)) is not None))
        for tensor in flat_tensors(result):
            is_new = recipe_of(tensor) is None
            made.append(Place.of(tensor, give_recipe(tensor)) if is_new else None)
            if is_new:
                writes.append(made[-1].recipe)  # type: ignore[union-attr]
        if not writes:
            return  # a view: it shows the same storage
        target = Place.of(args[0], writes[0]) if func in _OVERWRITES else None
        sources = [r for t in tree_flatten((args[1:], kwargs))[0] if isinstance(t, Tensor) and (r := recipe_of(t))]
        overwrites = target is not None and target.covers_all and writes[0] not in sources
        frozen_args, frozen_kwargs = tree_map(_operand, (tuple(args), _complete(func, operands, kwargs, result)))
        step = Step(
            next(_step_numbers), func, frozen_args, frozen_kwargs, reads, writes, made, overwrites, state
        )  # fmt: skip
        for recipe in reads:
            recipe.is_read = recipe.is_read or any(other is not recipe for other in writes)
        for recipe in writes:
            if overwrites and not recipe.is_read:
                recipe.steps.clear()  # nobody will ask for what was there
            recipe.steps.append(step)

    def _draw(self, func: Any, args: Any, kwargs: Any) -> None:
        """Let the generator advance as the operation would."""
        if args and isinstance(args[0], Tensor) and is_drawn_in_order(func, args[0]):
            draw(func, args[0].shape, args[0].dtype, args[1:], kwargs)
        elif func in _OVERWRITES:
            own = args[0]
            others, options = self._real((args[1:], kwargs))
            func(torch.empty_strided(own.shape, own.stride(), dtype=own.dtype), *others, **options)
        else:
            real_args, options = self._real((args, kwargs))
            func(*real_args, **options)

    def _real(self, operands: Any) -> Any:
        return tree_map_only(Tensor, lambda t: self.make(t) if recipe_of(t) is not None else t, operands)


class _Answers(TorchFunctionMode):
    """What a deferred tensor says of itself: that it is on the CPU; and its values, to code that leaves torch."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._recorder.paused or not args or not isinstance(args[0], Tensor):
            return func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name == "__get__":
            attribute = getattr(func, "__self__", None)
            if attribute is torch.Tensor.device and recipe_of(args[0]) is not None:
                return torch.device("cpu")
            if attribute is torch.Tensor.is_meta and recipe_of(args[0]) is not None:
                return False
        elif name in _READERS and recipe_of(args[0]) is not None:
            return func(self._recorder.make(args[0]), *args[1:], **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _arguments(func: Any) -> Iterator[tuple[int, Any]]:
    return enumerate(func._schema.arguments)


def _written(func: Any, args: Sequence[Any], kwargs: Any) -> list[Tensor]:
    """The operands that the operation changes."""
    chosen = [
        args[number] if number < len(args) else kwargs.get(argument.name)
        for number, argument in _arguments(func)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return [one for one in tree_flatten(chosen)[0] if isinstance(one, Tensor)]


def _is_host(device: Any) -> bool:
    return device is None or torch.device(device).type in ("cpu", "meta")


def _needs_values(func: Any) -> bool:
    """Whether what the operation returns is more than a tensor whose shape follows from shapes."""
    data_dependent = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags)
    return bool(data_dependent) or any("Tensor" not in str(returned.type) for returned in func._schema.returns)


def _may_be_deferred(func: Any, tensors: Sequence[Tensor], kwargs: Any) -> bool:
    """Whether an operation without deferred operands might make a large tensor out of little."""
    schema = func._schema
    if any(a.alias_info is not None for a in (*schema.arguments, *schema.returns)) or _needs_values(func):
        return False
    if not _is_host(kwargs.get("device")):
        return False
    if not tensors:
        is_factory = any(argument.name == "device" for argument in schema.arguments)
        return is_factory and _is_host(torch.get_default_device()) and kwargs.get("layout") in (None, torch.strided)
    if torch.Tag.nondeterministic_seeded in func.tags:
        return False
    return all(t.device.type == "cpu" and t.untyped_storage().nbytes() <= _SMALL_NBYTES for t in tensors)


def _meta_like(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _operand(operand: Any) -> Any:
    """How a step keeps an operand."""
    if not isinstance(operand, Tensor):
        return operand
    recipe = recipe_of(operand)
    if recipe is not None:
        return Place.of(operand, recipe)
    if operand.untyped_storage().nbytes() <= _COPIED_NBYTES:
        return Held(operand.detach().clone(), None)
    return Held(operand, operand._version)


def _complete(func: Callable[..., Any], operands: Sequence[Tensor], kwargs: Any, result: Any) -> dict[str, Any]:
    """Options that must not depend on when a step runs: the device, and the dtype that was the default then."""
    options = dict(kwargs)
    names = {argument.name for _, argument in _arguments(func)}
    if "device" in options:
        options["device"] = torch.device("cpu")
    if not operands and "dtype" in names and options.get("dtype") is None:
        options["dtype"] = flat_tensors(result)[0].dtype
    return options
