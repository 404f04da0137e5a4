"""Optimizers as light specs with torch's names, defaults and formulas."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from torch import Tensor, nn

from .kernels.optimizer import AdamScalars, SgdScalars, adam_, sgd_
from .layout import StateSlot
from .units import ParameterInfo

Scalars = AdamScalars | SgdScalars
GroupRule = Callable[[str, nn.Parameter], Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class OptimizerSpec(ABC):
    """Hyperparameters of every parameter group that does not set its own.

    Args:
        groups: None (one group); a function `name, parameter -> dict` of settings that differ (parameters with equal
            settings share a group); or a list of dicts as torch takes it, each with "params" (parameters or names) and
            the settings that differ.
    """

    groups: GroupRule | Sequence[Mapping[str, Any]] | None = None

    state_names: ClassVar[tuple[str, ...]] = ()

    @property
    def defaults(self) -> dict[str, Any]:
        """Settings by torch's names."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "groups"}

    def active_state_names(self) -> tuple[str, ...]:
        """The fp32 arrays that the update keeps per parameter, under torch's names."""
        return self.state_names

    @abstractmethod
    def scalars(self, group: Mapping[str, Any], step: int) -> Scalars:
        """The update's scalars for a parameter of `group` at its `step`-th update (>= 1)."""

    @abstractmethod
    def update(
        self,
        param: Tensor,
        low: Tensor | None,
        states: Mapping[str, Tensor],
        grad: Tensor,
        scalars: Scalars,
        grad_scale: float,
    ) -> None:
        """Update flat arrays [n] in place; see `kernels.optimizer`."""

    def check_names(self, group: Mapping[str, Any]) -> None:
        """Raises: ValueError for a setting that the optimizer does not have (schedulers may add theirs later)."""
        unknown = set(group) - set(self.defaults) - {"params", "param_names"}
        if unknown:
            raise ValueError(
                f"{type(self).__name__} has no setting {sorted(unknown)[0]!r}; it has {', '.join(self.defaults)}"
            )

    def check(self, group: Mapping[str, Any]) -> None:
        """Raises: ValueError naming the setting, its value and what was expected."""
        for name in ("lr", "eps", "weight_decay", "momentum"):
            if name in group and not group[name] >= 0:
                raise ValueError(f"{name}={group[name]!r}; {type(self).__name__} needs a number >= 0")

    def make_groups(self, parameters: Sequence[ParameterInfo]) -> list[dict[str, Any]]:
        """Parameter groups over the trainable ones of `parameters`, every setting filled in, in order of parameters.

        Raises: ValueError for unknown names, a parameter in two groups or in none, and settings out of range.
        """
        trainable = [info for info in parameters if info.trainable]
        if self.groups is None:
            raw: list[dict[str, Any]] = [{"params": [info.parameter for info in trainable]}]
        elif callable(self.groups):
            raw = self._groups_by_rule(trainable, self.groups)
        else:
            raw = self._groups_from_list(trainable, self.groups)
        groups = [{**self.defaults, **group} for group in raw if group["params"]]
        for group in groups:
            self.check_names(group)
            self.check(group)
        return groups

    def _groups_by_rule(self, trainable: Sequence[ParameterInfo], rule: GroupRule) -> list[dict[str, Any]]:
        groups: dict[str, dict[str, Any]] = {}
        for info in trainable:
            settings = dict(rule(info.name, info.parameter))
            key = repr(sorted(settings.items()))
            groups.setdefault(key, {**settings, "params": []})["params"].append(info.parameter)
        return list(groups.values())

    def _groups_from_list(
        self, trainable: Sequence[ParameterInfo], given: Sequence[Mapping[str, Any]]
    ) -> list[dict[str, Any]]:
        by_name = {name: info for info in trainable for name in info.names}
        by_parameter = {info.parameter: info for info in trainable}
        owner: dict[nn.Parameter, int] = {}
        groups = []
        for number, group in enumerate(given):
            members = []
            if "params" not in group:
                raise ValueError(f'group {number} has no "params"; list its parameters or their names there')
            for entry in group["params"]:
                info = by_name.get(entry) if isinstance(entry, str) else by_parameter.get(entry)
                if info is None:
                    what = repr(entry) if isinstance(entry, str) else f"a parameter of shape {tuple(entry.shape)}"
                    raise ValueError(f"group {number} lists {what}, which is not a trainable parameter of the model")
                if owner.setdefault(info.parameter, number) != number:
                    raise ValueError(f"{info.name!r} is in groups {owner[info.parameter]} and {number}; list it once")
                members.append(info.parameter)
            groups.append({**group, "params": members})
        lost = [info.name for info in trainable if info.parameter not in owner]
        if lost:
            raise ValueError(
                f"{len(lost)} trainable parameters are in no group, first {lost[0]!r}; add them to a group or set "
                "requires_grad=False on them before wrapping"
            )
        return groups

    def describe(self) -> dict[str, Any]:
        """What must agree when a store made with this optimizer is opened again."""
        settings = {k: v for k, v in asdict(self).items() if k != "groups"} if self.groups is None else {}
        return {"name": type(self).__name__, "states": list(self.active_state_names()), "settings": settings}


class WholeParameterSpec(OptimizerSpec):
    """An optimizer that needs each parameter whole, and whose states may have any shape and dtype."""

    @abstractmethod
    def slots(self, parameters: Sequence[ParameterInfo]) -> dict[nn.Parameter, Sequence[StateSlot]]:
        """The states of every trainable parameter. Raises: ValueError for a parameter that it cannot train."""

    @abstractmethod
    def step_parameter(
        self,
        info: ParameterInfo,
        master: Tensor,
        states: Mapping[str, Tensor],
        grad: Tensor,
        scalars: Any,
        grad_scale: float,
    ) -> None:
        """Update one parameter in place.

        Args:
            master: [numel] fp32.
            states: by name, in the shapes and dtypes of its slots; zeros before the first update.
            grad: [numel] in 16 bits or fp32; only read.
        """

    def update(
        self,
        param: Tensor,
        low: Tensor | None,
        states: Mapping[str, Tensor],
        grad: Tensor,
        scalars: Scalars,
        grad_scale: float,
    ) -> None:
        raise TypeError(f"{type(self).__name__} steps over whole parameters, not over ranges")


@dataclass(frozen=True, kw_only=True)
class Adam(OptimizerSpec):
    """Adam with L2 regularisation, as `torch.optim.Adam`. Source: Kingma and Ba, arXiv:1412.6980, algorithm 1."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    maximize: bool = False

    state_names: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    decoupled: ClassVar[bool] = False

    def scalars(self, group: Mapping[str, Any], step: int) -> AdamScalars:
        beta1, beta2 = group["betas"]
        return AdamScalars(
            lr=float(group["lr"]),
            beta1=float(beta1),
            beta2=float(beta2),
            eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]),
            step=step,
            decoupled=self.decoupled,
            maximize=bool(group["maximize"]),
        )

    def check(self, group: Mapping[str, Any]) -> None:
        super().check(group)
        if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
            raise ValueError(f"betas={group['betas']!r}; {type(self).__name__} needs two numbers in [0, 1)")

    def update(
        self,
        param: Tensor,
        low: Tensor | None,
        states: Mapping[str, Tensor],
        grad: Tensor,
        scalars: Scalars,
        grad_scale: float,
    ) -> None:
        assert isinstance(scalars, AdamScalars)
        adam_(param, low, states["exp_avg"], states["exp_avg_sq"], grad, scalars, grad_scale)


@dataclass(frozen=True, kw_only=True)
class AdamW(Adam):
    """Adam with decoupled weight decay, as `torch.optim.AdamW`. Source: Loshchilov and Hutter, arXiv:1711.05101."""

    weight_decay: float = 1e-2

    decoupled: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class SGD(OptimizerSpec):
    """Stochastic gradient descent with momentum and Nesterov's variant, as `torch.optim.SGD`."""

    lr: float = 1e-3
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    maximize: bool = False

    def active_state_names(self) -> tuple[str, ...]:
        has_momentum = self.momentum != 0 or (self.groups is not None)
        return ("momentum_buffer",) if has_momentum else ()

    def scalars(self, group: Mapping[str, Any], step: int) -> SgdScalars:
        return SgdScalars(
            lr=float(group["lr"]),
            momentum=float(group["momentum"]),
            dampening=float(group["dampening"]),
            weight_decay=float(group["weight_decay"]),
            nesterov=bool(group["nesterov"]),
            first=step == 1,
            maximize=bool(group["maximize"]),
        )

    def check(self, group: Mapping[str, Any]) -> None:
        super().check(group)
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError("nesterov=True needs a momentum > 0 and dampening=0, as in torch")
        if group["momentum"] != 0 and not self.active_state_names():
            raise ValueError(
                f"momentum={group['momentum']!r} in a run that was built without momentum buffers; give momentum to "
                f"SGD(...)"
            )

    def update(
        self,
        param: Tensor,
        low: Tensor | None,
        states: Mapping[str, Tensor],
        grad: Tensor,
        scalars: Scalars,
        grad_scale: float,
    ) -> None:
        assert isinstance(scalars, SgdScalars)
        buffer = states["momentum_buffer"] if scalars.momentum != 0 else None
        sgd_(param, low, buffer, grad, scalars, grad_scale)
