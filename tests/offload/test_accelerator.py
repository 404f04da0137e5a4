"""The promises of the suite on a real accelerator; the same functions run on the fake device everywhere."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offload import AdamW, OffloadConfig, OffloadEngine
from offload.scheduler.devices import AcceleratorDevice

ALL_NVME = {"param": "nvme", "states": "nvme", "grad": "nvme"}
DEVICES = ["fake", pytest.param("accelerator", marks=pytest.mark.gpu)]


def compute_device(name: str) -> torch.device:
    if name == "fake":
        return torch.device("cpu")
    found = torch.accelerator.current_accelerator()
    assert found is not None
    return torch.device(found.type, torch.accelerator.current_device_index())


def settings_for(name: str, **settings: Any) -> dict[str, Any]:
    return {"device": "fake" if name == "fake" else str(compute_device(name)), "clip_grad_norm": 0.5, **settings}


def loss_of(module: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    ids, targets = batch
    return F.cross_entropy(module(ids).float().flatten(0, 1), targets.flatten())


def run(model: nn.Module, config: OffloadConfig, batches: list[tuple[Tensor, Tensor]]) -> tuple[list[float], Any]:
    losses = []
    torch.manual_seed(3)
    with OffloadEngine(model, AdamW(lr=1e-2), config) as engine:
        for batch in batches:
            loss = loss_of(engine, batch)
            engine.backward(loss)
            losses.append(engine.step().loss)
        with engine.gather("*") as parameters:
            state = {
                f"{name}/{kind}": tensor.clone()
                for name, host in parameters.items()
                for kind, tensor in {"value": host.value, **host.states}.items()
            }
    return losses, state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", DEVICES)
def test_placements_agree_bit_for_bit(kit: SimpleNamespace, tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    device = compute_device(name)
    batches = [tuple(part.to(device) for part in batch) for batch in kit.batches(4)]
    largest = max(sum(p.numel() for p in block.parameters()) for block in kit.TinyGPT(depth=4).blocks)
    tight = 2 * (largest * 4 + 65536)
    placements = [
        settings_for(name, dtype=dtype),
        settings_for(name, dtype=dtype, device_memory=tight),
        settings_for(name, dtype=dtype, device_memory=tight, nvme=tmp_path / "run", homes=ALL_NVME),
        settings_for(name, dtype=dtype, update_on="device"),
        settings_for(name, dtype=dtype, update_on=0.5, nvme=tmp_path / "half", homes=ALL_NVME),
    ]
    runs = [run(kit.TinyGPT(depth=4, dropout=0.1), OffloadConfig(**one), batches) for one in placements]
    for losses, state in runs[1:]:
        assert losses == runs[0][0]
        assert [key for key in state if not torch.equal(state[key], runs[0][1][key])] == []


@pytest.mark.parametrize("name", DEVICES)
def test_first_step_equals_plain_torch_on_the_same_device(kit: SimpleNamespace, name: str) -> None:
    device = compute_device(name)
    batch = tuple(part.to(device) for part in kit.batches(1)[0])
    plain = kit.TinyGPT(depth=3)
    wrapped = copy.deepcopy(plain)
    plain.to(device)
    loss = loss_of(plain, batch)
    loss.backward()
    config = OffloadConfig(dtype=torch.float32, **{**settings_for(name), "clip_grad_norm": None})
    with OffloadEngine(wrapped, AdamW(lr=1e-2), config) as engine:
        mine = loss_of(engine, batch)
        engine.backward(mine)
        assert float(mine) == float(loss)
        with engine.gather("*") as parameters:
            for parameter_name, parameter in plain.named_parameters():
                found = parameters[parameter_name].grad
                assert found is not None
                assert torch.equal(found, parameter.grad.cpu()), parameter_name


@pytest.mark.gpu
def test_host_buffers_are_pinned_and_given_back() -> None:
    device = AcceleratorDevice(compute_device("accelerator"))
    source, target = device.allocate_host(1 << 20), device.allocate_host(1 << 20)
    slot = device.allocate(1 << 20)
    source.random_()
    device.upload(slot, source, None)
    device.download(target, slot, device.record())
    assert torch.equal(source, target)
    assert source.is_pinned()
    device.release_host(source)
    device.release_host(target)
