"""A small model whose training uses what a checkpoint must hold: three generators, dropout, batch norm, clipping,
accumulation and a scheduler."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from offload import AdamW, OffloadConfig, OffloadEngine
from offload.scheduler.devices import FakeDevice

NVME = {"param": "nvme", "states": "nvme", "grad": "nvme"}


class Net(nn.Module):
    """Blocks with dropout, a batch norm and maybe a frozen first block."""

    def __init__(self, width: int = 32, depth: int = 3, frozen: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.Tanh(), nn.Dropout(0.2), nn.Linear(2 * width, width))
            for _ in range(depth)
        )
        self.norm = nn.BatchNorm1d(width)
        if frozen:
            self.blocks[0].requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.norm(x.float()).square().mean() + x.float().pow(4).mean()


def placements(folder: Path) -> dict[str, dict[str, Any]]:
    """Settings that share no code path for bytes."""
    return {
        "memory": {"device": "cpu"},
        "nvme": {"nvme": folder / "nvme", "homes": NVME, "device": "cpu", "host_memory": "16MiB"},
        "mixed": {
            "nvme": folder / "mixed",
            "homes": {"param": "host", "states": "nvme", "grad": "host"},
            "device": "cpu",
            "host_memory": "16MiB",
            "update": "speculative",
        },
        "step": {
            "nvme": folder / "step",
            "durability": "none",
            "device": "cpu",
            "host_memory": "16MiB",
            "update": "step",
        },
        "fake": {"device": FakeDevice(seed=1, max_delay_s=3e-4), "device_memory": "1MiB"},
    }


def build(
    seed: int = 0, spec: Any = None, width: int = 32, depth: int = 3, frozen: bool = False, **settings: Any
) -> OffloadEngine:
    """An engine over a net made from `seed`, with a tracked scheduler as `engine.scheduler`."""
    torch.manual_seed(seed)
    chosen = {"dtype": torch.bfloat16, "keep_fp32": ["norm.*"], "micro_batches": 2, "clip_grad_norm": 1.0, **settings}
    engine = OffloadEngine(Net(width, depth, frozen), spec or AdamW(lr=1e-2), OffloadConfig(**chosen))
    engine.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(engine.optimizer, 20)
    engine.track(engine.scheduler)
    return engine


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  # the global one is what user code draws from


def train(engine: OffloadEngine, num_steps: int) -> list[float | None]:
    """Losses of steps whose data and dropout come from torch's generator, and whose scale from the two others."""
    losses = []
    width = engine.module.norm.num_features
    for _ in range(num_steps):
        for _ in range(engine.config.micro_batches):
            scale = 1 + random.random() + np.random.random()  # noqa: NPY002
            engine.backward(engine((torch.randn(16, width) * scale).to(engine.config.dtype)))
        losses.append(engine.step().loss)
        engine.scheduler.step()
    return losses


def snapshot(engine: OffloadEngine) -> dict[str, Tensor]:
    """Masters, states, counts, buffers, learning rate and the next random numbers."""
    found: dict[str, Tensor] = {}
    with engine.gather("*") as parameters:
        for name, host in parameters.items():
            found[name] = host.value.clone()
            found.update({f"{name}/{kind}": state.clone() for kind, state in host.states.items()})
            found[f"{name}/step"] = torch.tensor(host.step)
    found.update({f"buffer {name}": buffer.detach().clone() for name, buffer in engine.module.named_buffers()})
    found["lr"] = torch.tensor(engine.optimizer.param_groups[0]["lr"], dtype=torch.float64)
    found["torch"] = torch.get_rng_state()
    found["python"] = torch.tensor(random.getstate()[1])
    keys = np.random.get_state(legacy=False)["state"]["key"]  # noqa: NPY002
    found["numpy"] = torch.from_numpy(keys.astype(np.int64))
    return found


def differing(left: dict[str, Tensor], right: dict[str, Tensor]) -> list[str]:
    """Names whose tensors differ in a bit, or that only one side has."""
    both = left.keys() & right.keys()
    return sorted([*(left.keys() ^ right.keys()), *(name for name in both if not torch.equal(left[name], right[name]))])


@pytest.fixture(scope="session")
def runs() -> SimpleNamespace:
    """The helpers above, as attributes."""
    return SimpleNamespace(
        NVME=NVME,
        Net=Net,
        placements=placements,
        build=build,
        seed_all=seed_all,
        train=train,
        snapshot=snapshot,
        differing=differing,
    )
