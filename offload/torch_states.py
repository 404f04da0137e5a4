"""What `torch.optim` optimizers keep in their state dicts, taken apart for the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

HOW_NOT_WHAT = {"foreach", "fused", "capturable", "differentiable"}
"""Settings that choose how torch computes an update; they change no formula."""


@dataclass(frozen=True)
class TorchState:
    """One parameter's states, fp32 [shape] unless the optimizer has others, by torch's names; `step` counts updates."""

    step: int
    states: Mapping[str, Tensor]


def read_groups(
    packed: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], optimizer: str, names: Mapping[nn.Parameter, str]
) -> tuple[list[dict[str, Any]], dict[nn.Parameter, TorchState]]:
    """The settings of each group, and the states of each parameter, of a torch state dict.

    Parameters are told apart by "param_names" where the state dict has them, else by their place in the groups.

    Args:
        groups: the engine's.
        optimizer: the engine's, e.g. "AdamW".
        names: of all trainable parameters.

    Raises: ValueError for another number of groups or parameters, unknown names, and settings that change the formula.
    """
    saved = packed["param_groups"]
    if len(saved) != len(groups):
        raise ValueError(f"the state dict has {len(saved)} parameter groups, this run has {len(groups)}; give as many")
    settings, states = [], {}
    by_name = {name: parameter for parameter, name in names.items()}
    for number, (group, ours) in enumerate(zip(saved, groups, strict=True)):
        if len(group["params"]) != len(ours["params"]):
            raise ValueError(
                f"parameter group {number} has {len(group['params'])} parameters in the state dict and "
                f"{len(ours['params'])} in this run, which has trainable ones only; make the optimizer over the same"
            )
        members: list[nn.Parameter] = list(ours["params"])
        if "param_names" in group:
            unknown = sorted(set(group["param_names"]) ^ {names[parameter] for parameter in members})
            if unknown:
                raise ValueError(f"parameter group {number} differs in {unknown[:5]} ({len(unknown)} in all)")
            members = [by_name[name] for name in group["param_names"]]
        settings.append(_settings(group, ours, optimizer, number))
        for index, parameter in zip(group["params"], members, strict=True):
            states[parameter] = _state(packed["state"].get(index, {}))
    return settings, states


def _settings(group: Mapping[str, Any], ours: Mapping[str, Any], optimizer: str, number: int) -> dict[str, Any]:
    found = {}
    for key, value in group.items():
        if key in HOW_NOT_WHAT or key in ("params", "param_names"):
            continue
        if key == "decoupled_weight_decay" and key not in ours:
            if bool(value) != (optimizer == "AdamW") and optimizer in ("Adam", "AdamW"):
                raise ValueError(
                    f"parameter group {number} comes from {'AdamW' if value else 'Adam'}, this run trains with "
                    f"{optimizer}; build the engine with offload.{'AdamW' if value else 'Adam'}"
                )
        elif key == "amsgrad" and key not in ours:
            if value:
                raise ValueError(f"parameter group {number} has amsgrad=True, which {optimizer} does not offer")
        else:
            found[key] = float(value) if isinstance(value, Tensor) and value.numel() == 1 else value
    missing = sorted(set(ours) - set(found) - HOW_NOT_WHAT - {"params", "param_names", "initial_lr"})
    if missing:
        raise ValueError(
            f"parameter group {number} of the state dict has no {missing[0]!r}; it is of another optimizer than "
            f"{optimizer}"
        )
    return found


def _state(state: Mapping[str, Any]) -> TorchState:
    states = {kind: value for kind, value in state.items() if kind != "step" and value is not None}
    step = int(state["step"]) if "step" in state else int(bool(states))
    return TorchState(step, states)
