"""Any per-parameter class of `torch.optim` as the engine's optimizer: slower than the fused ones, with torch's numbers.

The class never sees the model. For every update of a parameter an instance is made around that parameter alone, given
the states that it left last time, stepped, and dropped. A class for which that is not the same as one instance over all
parameters cannot run here; `TorchOptimizer` finds out when it is made.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .kernels.gradient import copy_, scale_
from .layout import StateSlot
from .optimizers import GroupRule, WholeParameterSpec
from .torch_states import HOW_NOT_WHAT
from .units import ParameterInfo

PROBE_NUMEL = 1 << 16  # parameters up to this size are stood in for by one of their own shape
_SMALL = 64
_NUMBERS = {bool: torch.bool, int: torch.int64, float: torch.float64}


@dataclass(frozen=True, eq=False)
class TorchScalars:
    """Settings of one parameter at one update, and whether it is the parameter's first."""

    settings: Mapping[str, Any]
    first: bool


class TorchOptimizer(WholeParameterSpec):
    """A `torch.optim` class that steps each parameter on its own: Adafactor, NAdam, RMSprop, ..., or one of yours.

    Each update has a unit's parameters, gradients and states in host memory at once, which `host_memory` must hold
    beside the rest. Working memory of the class itself, a few times the largest parameter in fp32, lies outside.

    Args:
        optimizer: the class.
        groups: as in every spec.
        settings: what the class takes besides the parameters, e.g. lr=1e-3.

    Raises: ValueError for what is no such class, settings that it refuses, and a class that looks over several
        parameters, keeps anything outside of its per-parameter states, draws random numbers, or needs a closure.
    """

    def __init__(
        self,
        optimizer: type[torch.optim.Optimizer],
        /,
        *,
        groups: GroupRule | Sequence[Mapping[str, Any]] | None = None,
        **settings: Any,
    ) -> None:
        if not (isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer)):
            raise ValueError(
                f"TorchOptimizer was given {optimizer!r}; give a class of torch.optim and its settings, e.g. "
                "TorchOptimizer(torch.optim.Adafactor, lr=1e-2)"
            )
        object.__setattr__(self, "groups", groups)
        self._class = optimizer
        self._given = settings
        try:
            probe = optimizer([_parameter((3, 2))], **settings)
        except Exception as error:
            raise ValueError(f"{self._name} cannot be made with {settings}: {error}") from error
        self._defaults = {k: v for k, v in probe.param_groups[0].items() if k not in ("params", "param_names")}
        accepted = inspect.signature(optimizer).parameters
        self._arguments = {name for name in self._defaults if name in accepted} | set(settings)
        self._types: dict[str, type] = {}
        self._check_alone()

    def __repr__(self) -> str:
        return f"TorchOptimizer({self._name}, {', '.join(f'{k}={v!r}' for k, v in self._given.items())})"

    @property
    def _name(self) -> str:
        return self._class.__name__

    @property
    def defaults(self) -> dict[str, Any]:
        return dict(self._defaults)

    def check(self, group: Mapping[str, Any]) -> None:
        """Raises: ValueError, in the words of the class, for settings that it refuses."""
        self._make(_parameter((3, 2)), self._settings(group))

    def check_names(self, group: Mapping[str, Any]) -> None:
        unknown = set(group) - set(self._defaults) - {"params", "param_names"}
        if unknown:
            raise ValueError(f"{self._name} has no setting {sorted(unknown)[0]!r}; it has {', '.join(self._defaults)}")

    def scalars(self, group: Mapping[str, Any], step: int) -> Any:
        return TorchScalars(copy.deepcopy(self._settings(group)), step == 1)

    def describe(self) -> dict[str, Any]:
        settings = {k: _plain(v) for k, v in self._defaults.items() if k not in HOW_NOT_WHAT}
        name = f"{self._class.__module__}.{self._class.__qualname__}"
        return {"name": name, "states": [], "settings": settings if self.groups is None else {}}

    def _settings(self, group: Mapping[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in group.items() if k not in ("params", "param_names")}

    def _make(self, parameter: nn.Parameter, settings: Mapping[str, Any]) -> torch.optim.Optimizer:
        optimizer = self._class([parameter], **{k: settings[k] for k in self._arguments if k in settings})
        optimizer.param_groups[0].update(settings)
        return optimizer

    # -- states

    def slots(self, parameters: Sequence[ParameterInfo]) -> dict[nn.Parameter, Sequence[StateSlot]]:
        by_shape: dict[torch.Size, Sequence[StateSlot]] = {}
        slots = {}
        for info in parameters:
            if not info.trainable:
                continue
            if info.shape not in by_shape:
                try:
                    by_shape[info.shape] = self._slots_of(info.shape)
                except Exception as error:
                    raise ValueError(
                        f"{self._name} cannot train {info.name!r} of shape {tuple(info.shape)}: {error}; freeze it "
                        "before wrapping, or give another class"
                    ) from error
            slots[info.parameter] = by_shape[info.shape]
        return slots

    def _slots_of(self, shape: torch.Size) -> list[StateSlot]:
        """Found by two steps on a stand-in: one of the parameter's shape, or a small one where that is large.

        Raises: ValueError for states that are no tensors and no numbers, or that change between the steps.
        """
        stand_in, real = _stand_in(shape)
        kept = []
        states: dict[str, Any] = {}
        parameter = _parameter(stand_in)
        for seed in range(2):
            states = self._step_alone(parameter, _gradient(stand_in, seed), self._defaults, states)
            kept.append({name: _form(name, state) for name, state in states.items()})
        if kept[0] != kept[1]:
            raise ValueError(f"its states change from {kept[0]} after one step to {kept[1]} after two")
        slots = []
        for name, state in states.items():
            self._types[name] = type(state)
            if isinstance(state, Tensor):
                slots.append(StateSlot(name, torch.Size(_real_shape(name, state.shape, stand_in, real)), state.dtype))
            elif state is not None:
                slots.append(StateSlot(name, torch.Size(()), _NUMBERS[type(state)]))
        return slots

    def step_parameter(
        self,
        info: ParameterInfo,
        master: Tensor,
        states: Mapping[str, Tensor],
        grad: Tensor,
        scalars: TorchScalars,
        grad_scale: float,
    ) -> None:
        gradient = torch.empty(grad.numel(), dtype=torch.float32)
        copy_(gradient, grad)
        if grad_scale != 1.0:
            scale_(gradient, grad_scale)
        before: dict[str, Any] = {}
        if not scalars.first:
            before = {name: self._loaded(name, state) for name, state in states.items()}
            before.update((name, None) for name, kind in self._types.items() if kind is type(None))
        parameter = nn.Parameter(master.view(info.shape))
        after = self._step_alone(parameter, gradient.view(info.shape), scalars.settings, before)
        for name, state in after.items():
            if state is None:
                continue
            slot = states.get(name)
            shape, dtype = _form(name, state)
            if slot is None or (slot.shape, slot.dtype) != (shape, dtype):
                known = {name: (tuple(one.shape), one.dtype) for name, one in states.items()}
                raise RuntimeError(
                    f"{self._name} left {info.name!r} the state {name!r} of shape {tuple(shape)}, {dtype}; when it was "
                    f"tried out it left {known}. Such a class cannot run in the engine"
                )
            if not isinstance(state, Tensor):
                slot.fill_(state)
            elif state.data_ptr() != slot.data_ptr() or not state.is_contiguous():
                slot.copy_(state)

    def _loaded(self, name: str, state: Tensor) -> Any:
        return state if issubclass(self._types[name], Tensor) else self._types[name](state.item())

    def _step_alone(
        self, parameter: nn.Parameter, gradient: Tensor, settings: Mapping[str, Any], states: dict[str, Any]
    ) -> dict[str, Any]:
        """One step of an instance of its own over `parameter`, in place; `states`, empty before the first, as well."""
        optimizer = self._make(parameter, settings)
        if states:
            optimizer.state[parameter] = states
        parameter.grad = gradient
        optimizer.step()
        parameter.grad = None
        return dict(optimizer.state.get(parameter, {}))

    # -- whether the class can run here

    def _check_alone(self) -> None:
        """One instance over two parameters for three steps, against an instance per parameter and step."""
        shapes = [(5, 3), (4, 6)]
        together = [_parameter(shape) for shape in shapes]
        alone = [_parameter(shape) for shape in shapes]
        states: list[dict[str, Any]] = [{}, {}]
        try:
            with torch.random.fork_rng(devices=[]):
                optimizer = self._class(together, **self._given)
                for step in range(3):
                    for number, shape in enumerate(shapes):
                        together[number].grad = _gradient(shape, step + 10 * number)
                    optimizer.step()
                    for number, shape in enumerate(shapes):
                        gradient = _gradient(shape, step + 10 * number)
                        states[number] = self._step_alone(alone[number], gradient, self._defaults, states[number])
        except Exception as error:
            raise ValueError(
                f"{self._name} cannot step over one parameter after the other with dense gradients and no closure: "
                f"{error}. {_MEND}"
            ) from error
        if not all(torch.equal(one, other) for one, other in zip(together, alone, strict=True)):
            raise ValueError(
                f"{self._name} does not step each parameter by itself: it looks over several, keeps something outside "
                f"of its per-parameter states, or draws random numbers. {_MEND}"
            )


_MEND = (
    "Give a class that keeps one state per parameter (Adafactor, NAdam, RMSprop, ...), or one of the engine's own "
    "(AdamW, Adam, SGD)"
)


def _parameter(shape: Sequence[int]) -> nn.Parameter:
    return nn.Parameter(_gradient(shape, 1234) + 0.5)


def _gradient(shape: Sequence[int], seed: int) -> Tensor:
    """The same for a seed, whatever the global generator says, which is left alone."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def _form(name: str, state: Any) -> tuple[torch.Size, torch.dtype | None]:
    """Shape and dtype in which a state is kept. Raises: ValueError for one that cannot be."""
    if isinstance(state, Tensor):
        return state.shape, state.dtype
    if state is None:
        return torch.Size(()), None
    if type(state) not in _NUMBERS:
        raise ValueError(f"its state {name!r} is a {type(state).__name__}, and only tensors and numbers can be kept")
    return torch.Size(()), _NUMBERS[type(state)]


def _stand_in(shape: Sequence[int]) -> tuple[tuple[int, ...], dict[int, int]]:
    """A shape to try the class out on, and the real size of each of its sizes that stands for another."""
    if math.prod(shape) <= PROBE_NUMEL:
        return tuple(shape), {}
    sizes = _distinct_sizes()
    stand_in, real = list(shape), {}
    for position in sorted(range(len(shape)), key=lambda position: shape[position]):
        if shape[position] > _SMALL:
            stand_in[position] = next(sizes)
            real[stand_in[position]] = shape[position]
    numel, stands_for = math.prod(stand_in), math.prod(shape)
    real.setdefault(numel, stands_for)
    return tuple(stand_in), real


def _distinct_sizes() -> Iterator[int]:
    """Primes above the sizes that stay as they are, so that no product of others is one of them."""
    candidate = _SMALL
    while True:
        candidate += 1
        if all(candidate % divisor for divisor in range(2, math.isqrt(candidate) + 1)):
            yield candidate


def _real_shape(name: str, shape: Sequence[int], stand_in: Sequence[int], real: Mapping[int, int]) -> list[int]:
    sizes = [real.get(size, size) for size in shape]
    if real and any(size > _SMALL and size not in real for size in shape):
        raise ValueError(f"its state {name!r} has shape {tuple(shape)} for a parameter of shape {tuple(stand_in)}")
    return sizes


def _plain(value: Any) -> Any:
    """What can be written down and compared."""
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else repr(value)
