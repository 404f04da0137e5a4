"""`engine.optimizer`: a real torch optimizer in whose groups lr schedulers and users read and write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from .access import HostParameter
from .optimizers import OptimizerSpec


class OptimizerHost(Protocol):
    """What the optimizer asks of the engine."""

    def step(self) -> Any: ...
    def drop_gradients(self) -> None: ...
    def read_states(self) -> dict[nn.Parameter, HostParameter]: ...


class EngineOptimizer(torch.optim.Optimizer):
    """Holds the hyperparameters; states and gradients live in the engine.

    `step()` is `engine.step()`, `zero_grad()` drops an unfinished accumulation, `state_dict()` has torch's form.
    """

    def __init__(self, host: OptimizerHost, spec: OptimizerSpec, groups: list[dict[str, Any]]) -> None:
        self._host = host
        self._spec = spec
        super().__init__(groups or [{**spec.defaults, "params": []}], dict(spec.defaults))
        self._sealed = True

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One `engine.step()`; returns the closure's loss as torch does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._host.step()
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
                    packed["state"][index] = {**known, **host.states}
                index += 1
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises: RuntimeError: states of another optimizer are loaded through `engine.gather(..., write=True)`."""
        raise RuntimeError(
            "engine.optimizer.load_state_dict is refused, because states live in the engine; write them inside "
            "`with engine.gather('*', write=True) as parameters:` (parameters[name].states, .step)"
        )
