"""`engine.optimizer` takes state dicts of plain torch optimizers, and plain torch takes the engine's."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from offload import SGD, Adam, AdamW, OffloadConfig, OffloadEngine

OPTIMIZERS = {
    "AdamW": (torch.optim.AdamW, AdamW, {"lr": 3e-3, "weight_decay": 0.1, "betas": (0.8, 0.95)}),
    "Adam": (torch.optim.Adam, Adam, {"lr": 3e-3, "weight_decay": 0.1}),
    "SGD": (torch.optim.SGD, SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    "SGD without momentum": (torch.optim.SGD, SGD, {"lr": 0.05}),
}


def train(call: Any, backward: Any, optimizer: Any, data: Any) -> list[float]:
    losses = []
    for x, y in data:
        loss = call(x, y)
        backward(loss)
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def plain_steps(model: nn.Module, optimizer: torch.optim.Optimizer, data: Any) -> list[float]:
    return train(model, torch.Tensor.backward, optimizer, data)


@pytest.mark.parametrize("which", OPTIMIZERS)
@pytest.mark.parametrize("placement", ["memory", "nvme"])
def test_there_and_back(kit: Any, runs: SimpleNamespace, tmp_path: Path, which: str, placement: str) -> None:
    """Plain torch for 3 steps, the engine for 3, plain torch for 3: the numbers of 9 plain ones."""
    make, spec, settings = OPTIMIZERS[which]
    data = kit.batches(9)
    model = kit.TinyGPT(tied=True)
    optimizer = make(model.parameters(), **settings)
    reference = copy.deepcopy(model)
    expected = plain_steps(reference, make(reference.parameters(), **settings), data)

    losses = plain_steps(model, optimizer, data[:3])
    saved = copy.deepcopy(optimizer.state_dict())
    config = OffloadConfig(dtype=torch.float32, **runs.placements(tmp_path)[placement])
    with OffloadEngine(model, spec(lr=1.0, momentum=0.9) if "momentum" in settings else spec(lr=1.0), config) as engine:
        engine.optimizer.load_state_dict(saved)
        back = engine.optimizer.state_dict()
        assert back["state"].keys() == saved["state"].keys() or which == "SGD without momentum"
        for index, state in back["state"].items():
            for kind, value in state.items():
                assert kit.bits(value) == kit.bits(saved["state"][index][kind]), (index, kind)
        losses += train(engine, engine.backward, engine.optimizer, data[3:6])
        packed, weights = engine.optimizer.state_dict(), engine.state_dict()
    last = kit.TinyGPT(tied=True)
    last.load_state_dict(weights)
    optimizer = make(last.parameters(), lr=7.0)
    optimizer.load_state_dict(packed)
    losses += plain_steps(last, optimizer, data[6:])
    assert losses == pytest.approx(expected, rel=2e-6)
    for group, wanted in zip(optimizer.param_groups, [settings], strict=True):
        assert {key: group[key] for key in wanted} == wanted


def test_names_in_the_state_dict_find_their_parameters(kit: Any) -> None:
    """A state dict made over named parameters in another order."""
    model = kit.TinyGPT(tied=False)
    named = list(model.named_parameters())[::-1]
    optimizer = torch.optim.AdamW(named, lr=1e-3)
    plain_steps(model, optimizer, kit.batches(2))
    states = {name: optimizer.state[parameter] for name, parameter in named}
    with OffloadEngine(copy.deepcopy(model), AdamW(), OffloadConfig(dtype=torch.float32, device="cpu")) as engine:
        engine.optimizer.load_state_dict(optimizer.state_dict())
        for name, host in kit.state_of(engine).items():
            assert torch.equal(host.states["exp_avg"], states[name]["exp_avg"])
            assert torch.equal(host.states["exp_avg_sq"], states[name]["exp_avg_sq"])
            assert host.step == 2
        assert engine.optimizer.param_groups[0]["lr"] == 1e-3


REFUSED: dict[str, tuple[Any, str]] = {
    "groups": (lambda d: d["param_groups"].append(d["param_groups"][0]), "has 2 parameter groups, this run has 1"),
    "fewer": (lambda d: d["param_groups"][0]["params"].pop(), r"has \d+ parameters in the state dict and \d+ in this"),
    "shape": (lambda d: d["state"][0].update(exp_avg=torch.zeros(3)), r"exp_avg of 'tokens.weight' has shape \(3,\)"),
    "kind": (lambda d: d["state"][1].update(max_exp_avg_sq=torch.zeros(3)), r"are \['exp_avg', 'exp_avg_sq', 'max_"),
    "lost": (lambda d: d["state"][1].pop("exp_avg"), r"states of 'positions.weight' are \['exp_avg_sq'\]"),
    "amsgrad": (lambda d: d["param_groups"][0].update(amsgrad=True), "amsgrad=True, which AdamW does not offer"),
    "adam": (lambda d: d["param_groups"][0].update(decoupled_weight_decay=False), "comes from Adam, this run trains"),
    "other": (lambda d: d["param_groups"][0].pop("betas"), "has no 'betas'; it is of another optimizer than AdamW"),
    "range": (lambda d: d["param_groups"][0].update(lr=-1.0), "lr=-1.0; AdamW needs a number >= 0"),
    "names": (
        lambda d: d["param_groups"][0].update(param_names=["x"] * len(d["param_groups"][0]["params"])),
        "parameter group 0 differs in",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused(kit: Any, what: str) -> None:
    model = kit.TinyGPT(tied=True)
    optimizer = torch.optim.AdamW(model.parameters())
    plain_steps(model, optimizer, kit.batches(1))
    packed = copy.deepcopy(optimizer.state_dict())
    change, message = REFUSED[what]
    change(packed)
    with OffloadEngine(model, AdamW(lr=0.5), OffloadConfig(dtype=torch.float32, device="cpu")) as engine:
        before = kit.state_of(engine)
        with pytest.raises(ValueError, match=message):
            engine.optimizer.load_state_dict(packed)
        kit.assert_same_state(kit.state_of(engine), before)
        assert engine.optimizer.param_groups[0]["lr"] == 0.5
