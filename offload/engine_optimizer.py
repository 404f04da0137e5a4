"""`engine.optimizer`: a real torch optimizer in whose groups lr schedulers and users read and write."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from .access import HostParameter
from .optimizers import OptimizerSpec
from .torch_states import TorchState, read_groups
from .update import AVERAGE


class OptimizerHost(Protocol):
    """What the optimizer asks of the engine."""

    def step(self, partial: bool = False) -> Any: ...
    def drop_gradients(self) -> None: ...
    def read_states(self) -> dict[nn.Parameter, HostParameter]: ...
    def write_states(self, states: Mapping[nn.Parameter, TorchState]) -> None: ...
    def names(self) -> dict[nn.Parameter, str]: ...


class EngineOptimizer(torch.optim.Optimizer):
    """Holds the hyperparameters; states and gradients live in the engine.

    `step()` is `engine.step()`, `zero_grad()` drops an unfinished accumulation, `state_dict()` has torch's form.

    Attributes:
        accept_partial: whether `step()` takes fewer backwards than `micro_batches`, as a loop's last one may have.
    """

    def __init__(self, host: OptimizerHost, spec: OptimizerSpec, groups: list[dict[str, Any]]) -> None:
        self._host = host
        self._spec = spec
        self.accept_partial = False
        super().__init__(groups or [{**spec.defaults, "params": []}], dict(spec.defaults))
        self._sealed = True

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One `engine.step()`; returns the closure's loss as torch does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._host.step(partial=self.accept_partial)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients accumulated since the last step. An update that was decided is never dropped."""
        self._host.drop_gradients()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raises: RuntimeError after construction: the engine places all states when it is built."""
        if hasattr(self, "_sealed"):
            raise RuntimeError(
                "add_param_group on engine.optimizer; the engine places all states when it is built: give the groups "
                "to the optimizer's spec, e.g. AdamW(groups=[...])"
            )
        # The plain function: torch's wrapper loads its compiler at the first call, 150 MB of resident memory.
        add = torch.optim.Optimizer.add_param_group
        getattr(add, "__wrapped__", add)(self, param_group)

    def state_dict(self) -> dict[str, Any]:
        """torch's form, with states brought to host memory: {"state": {index: {...}}, "param_groups": [...]}."""
        packed = super().state_dict()
        states = self._host.read_states()
        index = 0
        packed["state"] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                host = states[parameter]
                if host.step:
                    step = torch.tensor(float(host.step))
                    known = {} if "momentum" in group else {"step": step}
                    packed["state"][index] = {**known, **{k: v for k, v in host.states.items() if k != AVERAGE}}
                index += 1
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take states, step counts and hyperparameters over from a state dict of this class or of torch's own one.

        Raises: ValueError naming what does not fit (groups, shapes, kinds of states); nothing is changed then.
        """
        settings, states = read_groups(state_dict, self.param_groups, type(self._spec).__name__, self._host.names())
        for group in settings:
            self._spec.check({**self._spec.defaults, **group})
        self._host.write_states(states)
        for group, found in zip(self.param_groups, settings, strict=True):
            group.update(copy.deepcopy(found))
