"""Doors through which a module's parameters could be read, copied or moved as a whole: real values, or a refusal."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .bindings import ReleasedParameters
from .units import ParameterInfo


class GradientInEngine(Tensor):
    """What `parameter.grad` shows between backward and step: there is a gradient, and it lives in the engine.

    Every operation on it raises, also those inside `torch.nn.utils.clip_grad_norm_`. A `torch.amp.GradScaler` may
    unscale it: all of an optimizer's gradients come to that in one call, as fp32, in which updates take them.

    Args:
        unscale: takes the scaler's flag "an infinity was found" and the inverse of its scale.
    """

    unscale: Callable[[Tensor, Tensor], None]

    @staticmethod
    def __new__(cls, placeholder: Tensor, unscale: Callable[[Tensor, Tensor], None]) -> GradientInEngine:
        gradient = torch.Tensor._make_subclass(cls, placeholder.detach())
        gradient.unscale = unscale
        return gradient

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch._amp_foreach_non_finite_check_and_unscale_:
            gradients, found_inf, inverse = args
            gradients[0].unscale(found_inf, inverse)
            return None
        if func == torch.Tensor.dtype.__get__:  # type: ignore[attr-defined]
            return torch.float32
        if getattr(func, "__name__", "") in _HARMLESS:
            return super().__torch_function__(func, types, args, kwargs or {})
        raise RuntimeError(
            f"{getattr(func, '__name__', func)!r} on a gradient that lives in the engine; clip with "
            "engine.clip_grad_norm_(...) or OffloadConfig(clip_grad_norm=...), read or edit it inside "
            "`with engine.gather(..., write=True)`"
        )


_HARMLESS = {"__get__", "__set__", "__repr__", "size", "dim", "numel", "__hash__", "is_floating_point", "__len__"}


def is_guarded(parameter: nn.Parameter) -> bool:
    """Whether an engine has the parameter's values."""
    return "__reduce_ex__" in vars(parameter)


class Guards:
    """Puts the guards on a module tree and takes them off.

    Args:
        show: gives a parameter real values for whoever looks it up.
        value: returns a fresh host tensor of a parameter's values in its compute dtype, for `module.state_dict()`.
        drop_gradients: what `module.zero_grad()` means.
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: Sequence[ParameterInfo],
        show: Callable[[nn.Parameter], nn.Parameter],
        value: Callable[[nn.Parameter], Tensor],
        drop_gradients: Callable[[], None],
    ) -> None:
        self._value = value
        self._known = {info.parameter for info in parameters}
        self._trainable = {info.parameter for info in parameters if info.trainable}
        self._alive: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()
        self._undo: list[Callable[[], None]] = []
        for part in module.modules():
            self._guard_module(part, show, drop_gradients)
        for info in parameters:
            for method in ("__deepcopy__", "__reduce_ex__"):
                self._set(info.parameter, method, _refusal(f"copying parameter {info.name!r}", _COPY_MEND))

    def _guard_module(
        self, part: nn.Module, show: Callable[[nn.Parameter], nn.Parameter], drop_gradients: Callable[[], None]
    ) -> None:
        name = type(part).__name__
        self._set(part, "_apply", _refusal(f"moving or casting {name}", _MOVE_MEND))
        self._set(part, "__deepcopy__", _refusal(f"deep-copying {name}", _COPY_MEND))
        self._set(part, "__reduce_ex__", _refusal(f"pickling {name}", _COPY_MEND))
        self._set(part, "zero_grad", self._zero_grad(part, drop_gradients))
        original = part._parameters
        object.__setattr__(part, "_parameters", ReleasedParameters(original, show))
        self._undo.append(lambda: object.__setattr__(part, "_parameters", dict(dict.items(part._parameters))))
        object.__setattr__(part, "_modules", FixedModules(part._modules, name))
        self._undo.append(lambda: object.__setattr__(part, "_modules", dict(part._modules)))
        for method, mend in _LATE_CHANGES.items():
            if hasattr(type(part), method):
                self._set(part, method, _refusal(f"{method}() on the wrapped {name}", mend))
        part.__dict__["_ddp_params_and_buffers_to_ignore"] = _RefusesDistributed()
        self._undo.append(lambda: part.__dict__.pop("_ddp_params_and_buffers_to_ignore", None))
        hook = part._register_state_dict_hook(self._fill_state_dict)
        self._undo.append(hook.remove)
        hook = part.register_load_state_dict_pre_hook(_refuse_load)
        self._undo.append(hook.remove)

    def _zero_grad(self, part: nn.Module, drop_gradients: Callable[[], None]) -> Callable[..., None]:
        trainable = set(part.parameters()) & self._trainable

        def zero_grad(set_to_none: bool = True) -> None:
            if trainable and trainable != self._trainable:
                raise RuntimeError(
                    f"zero_grad() on {type(part).__name__}, a part of the wrapped module, is refused, because the "
                    "engine drops all gradients of a step or none; call engine.optimizer.zero_grad()"
                )
            if trainable:
                drop_gradients()

        return zero_grad

    def _set(self, target: Any, name: str, value: Any) -> None:
        """Shadow a method of one object."""
        target.__dict__[name] = value
        self._undo.append(lambda: target.__dict__.pop(name, None))

    def _fill_state_dict(self, part: nn.Module, destination: dict[str, Any], prefix: str, _: Any) -> None:
        """Replace the placeholders that `module.state_dict()` collected by values; tied names share one tensor."""
        for name, parameter in dict.items(part._parameters):
            key = prefix + name
            if parameter in self._known and key in destination:
                value = self._alive.get(id(parameter))
                if value is None:
                    value = self._alive[id(parameter)] = self._value(parameter)
                destination[key] = value

    def values_changed(self) -> None:
        """Copies handed out before are old from here on and may not be shared with later ones."""
        self._alive.clear()

    def remove(self) -> None:
        """Take all guards off."""
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()


class FixedModules(dict[str, nn.Module | None]):
    """Stands in for a module's `_modules`: modules may come, go and move, but none with parameters of its own comes."""

    def __init__(self, original: Mapping[str, nn.Module | None], owner: str) -> None:
        super().__init__(original)
        self._owner = owner

    def __setitem__(self, name: str, module: nn.Module | None) -> None:
        for part in module.modules() if module is not None else ():
            if not isinstance(part._parameters, ReleasedParameters) and any(
                parameter is not None for parameter in part._parameters.values()
            ):
                raise RuntimeError(
                    f"{type(part).__name__}, put into the wrapped {self._owner} as {name!r}, has parameters that the "
                    "engine has no home, gradient and states for; change the module first and wrap it then, with "
                    "engine.state_dict() loaded into it if it was trained before"
                )
        super().__setitem__(name, module)

    def __reduce__(self) -> tuple[type[dict[str, nn.Module | None]], tuple[dict[str, nn.Module | None]]]:
        return dict, (dict(self),)


class _RefusesDistributed:
    """What DistributedDataParallel asks a module for first."""

    def __iter__(self) -> NoReturn:
        raise RuntimeError(
            "DistributedDataParallel around a wrapped module is refused, because parameters and gradients live in this "
            "process's engine; an engine trains on one device: give each process a model and an engine of its own"
        )


_COPY_MEND = "its values live in the engine: use engine.state_dict() and load it into a module of your own"
_CHANGE_MEND = "its parameters are in the engine's plan: change the model first and wrap it then"
_LATE_CHANGES = {
    "resize_token_embeddings": _CHANGE_MEND,
    "resize_position_embeddings": _CHANGE_MEND,
    "merge_and_unload": _COPY_MEND,
    "merge_adapter": _COPY_MEND,
    "unmerge_adapter": _COPY_MEND,
    "_replicate_for_data_parallel": "DataParallel would copy its parameters, which live in the engine: an engine "
    "trains on one device, so call it without DataParallel",
}
"""Methods (of Hugging Face, peft and torch) that would exchange, edit or copy parameters behind the engine's back."""
_MOVE_MEND = (
    "its values live in the engine: choose device and dtype in OffloadConfig, or take engine.state_dict() and load "
    "it into a "
    "module of your own"
)


def _refusal(what: str, mend: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"{what} is refused; {mend}")

    return refuse


def _refuse_load(module: nn.Module, *args: Any) -> None:
    raise RuntimeError(
        f"load_state_dict on {type(module).__name__} is refused, because its values live in the engine; use "
        "engine.load_state_dict(state_dict)"
    )
