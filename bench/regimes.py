"""Regimes: small steps whose slowest lane is known, on rigs that are made for them.

A regime says how many seconds each lane is to be busy in one step; the rig's speeds follow from the bytes of the
placement. Everything is small (a few million parameters), so that real work is far below the paced time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from offload.scheduler.rig import GB, ComputeSpeed, CoreSpeed, DriveSpeed, LinkSpeed, Rig, TierSizes

from .models.paced import PacedStack, ProductStack

IN_MEMORY = {"param": "host", "states": "host", "grad": "host"}
STATES_ON_NVME = {"param": "host", "states": "nvme", "grad": "host"}
ALL_BUT_GRADIENTS_ON_NVME = {"param": "nvme", "states": "nvme", "grad": "host"}

STATES_PER_ELEMENT = 10  # low half 2, two moments 8
PARAM_PER_ELEMENT = 2
FAST = math.inf


@dataclass(frozen=True, kw_only=True)
class Regime:
    """One step on one rig.

    Args:
        name: of the slowest lane, as the table shows it.
        compute_s: seconds of compute in a step: a quarter in forward, a quarter recomputed, half in backward. Where
            `rows` is set compute is that of true matrix products, and these are the seconds aimed at.
        read_s, write_s, h2d_s, d2h_s: seconds that the lane takes for the bytes of a step; 0: as fast as memory.
        update_s: seconds that two cores take for the updates of a step; 0: as fast as they are.
        law: how the drive serves both directions together.
        num_units, width: the model has `num_units` units of width * width parameters.
        chunks: chunks per unit; a block of 2M parameters has four.
        homes: where each kind rests.
        link: whether the device has a memory of its own.
        micro_batches: backwards per step, all of them together `compute_s`.
        rows: rows of the batch of true matrix products; None: paced compute.
    """

    name: str
    compute_s: float
    read_s: float = 0.0
    write_s: float = 0.0
    h2d_s: float = 0.0
    d2h_s: float = 0.0
    update_s: float = 0.0
    law: str = "duplex"
    num_units: int = 24
    width: int = 512
    chunks: int = 4
    homes: Mapping[str, str] = field(default_factory=lambda: STATES_ON_NVME)
    link: bool = False
    micro_batches: int = 1
    rows: int | None = None

    @property
    def numel(self) -> int:
        """Parameters of the model."""
        return self.num_units * self.width**2

    @property
    def uses_nvme(self) -> bool:
        return "nvme" in self.homes.values()

    def rig(self) -> Rig:
        """The rig on which each lane is busy for as long as the regime says, when bytes are those of the byte table."""
        states, on_drive = STATES_PER_ELEMENT * self.numel, self.homes["param"] == "nvme"
        param = PARAM_PER_ELEMENT * self.numel
        grads = param if self.micro_batches == 1 else 2 * param
        return Rig(
            name=self.name,
            drive=DriveSpeed(
                read_gb_s=_speed(states + 2 * param * on_drive, self.read_s),
                write_gb_s=_speed(states + param * on_drive, self.write_s),
                law=self.law,
                latency_s=0.0,
                depth=8,
            )
            if self.uses_nvme
            else None,
            link=LinkSpeed(h2d_gb_s=_speed(2 * param, self.h2d_s), d2h_gb_s=_speed(grads, self.d2h_s))
            if self.link
            else None,
            cores=CoreSpeed(
                count=2,
                update_elements_s=self.numel / 2 / self.update_s if self.update_s else FAST,
                dram_gb_s=FAST,
            ),
            compute=ComputeSpeed(flop_s=FAST),
            sizes=TierSizes(host=1 << 30, device=1 << 30 if self.link else 0, nvme=1 << 40 if self.uses_nvme else 0),
        )

    def model(self) -> nn.Module:
        """The model; takes [B, width] and returns a scalar loss."""
        if self.rows is not None:
            return ProductStack(self.num_units, self.width)
        calls = self.num_units * self.micro_batches
        return PacedStack(self.num_units, self.width, self.compute_s / 4 / calls, self.compute_s / 2 / calls)


def _speed(nbytes: float, seconds: float) -> float:
    return nbytes / seconds / GB if seconds else FAST


REGIMES = (
    Regime(name="compute", compute_s=1.6, read_s=0.2, write_s=0.2, update_s=0.1),
    Regime(name="read", compute_s=0.4, read_s=0.6, write_s=0.3, update_s=0.1),
    Regime(name="write", compute_s=0.4, read_s=0.3, write_s=0.6, update_s=0.1),
    Regime(name="duplex", compute_s=0.4, read_s=0.6, write_s=0.6, update_s=0.1),
    Regime(name="shared drive", compute_s=0.4, read_s=0.3, write_s=0.3, law="additive", update_s=0.1),
    Regime(
        name="params on NVMe", compute_s=0.4, read_s=0.7, write_s=0.6, update_s=0.1, homes=ALL_BUT_GRADIENTS_ON_NVME
    ),
    Regime(name="link", compute_s=0.3, h2d_s=0.8, d2h_s=0.4, update_s=0.1, homes=IN_MEMORY, link=True),
    Regime(name="optimizer", compute_s=0.4, update_s=0.6, homes=IN_MEMORY),
    Regime(
        name="balanced", compute_s=1.0, read_s=0.25, write_s=0.25, h2d_s=0.5, d2h_s=0.5, update_s=0.25, link=True
    ),
    Regime(name="tiny units", compute_s=0.6, read_s=0.4, write_s=0.4, update_s=0.1, num_units=96, width=128, chunks=1),
    Regime(
        name="4 micro-batches", compute_s=0.6, read_s=0.5, write_s=0.4, h2d_s=0.5, d2h_s=0.4, update_s=0.1,
        homes=ALL_BUT_GRADIENTS_ON_NVME, link=True, micro_batches=4,
    ),
    Regime(name="compute, true products", compute_s=1.2, read_s=0.2, write_s=0.2, num_units=12, width=768, rows=3072),
    Regime(name="read, true products", compute_s=0.6, read_s=0.8, write_s=0.4, rows=128, width=640),
)  # fmt: skip


def regime(name: str) -> Regime:
    """The regime of that name. Raises: ValueError if there is none."""
    for one in REGIMES:
        if one.name == name:
            return one
    raise ValueError(f"no regime {name!r}; expected one of {', '.join(repr(one.name) for one in REGIMES)}")
