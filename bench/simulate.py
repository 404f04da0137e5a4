"""What the simulator needs to know of a model and of a run: built without memory, with its compute by call."""

import statistics
from collections.abc import Callable
from dataclasses import replace

import torch

from offload import AdamW, OffloadEngine
from offload.simulation import SimulatedStep, Simulation
from offload.units import CallSite

from .models.gpt import GPT, Block, GPTConfig
from .regimes import IN_MEMORY, Regime
from .schedule_table import AS_IT_IS, Feature, batch_of, config_of


def gpt_on_meta(config: GPTConfig) -> GPT:
    """The model with shapes and without values."""
    with torch.device("meta"):
        return GPT(config)


def gpt_seconds(config: GPTConfig, *, batch: int, seq: int, flop_s: float) -> Callable[[CallSite], tuple[float, float]]:
    """Compute seconds of each call of a GPT for one micro-batch; see `Simulation`.

    The operations are those of `GPTConfig.flops_per_token`, of which blocks and the head have all.
    """
    block = 2 * 12 * config.width**2 + 2 * seq * config.width
    head = 2 * config.vocabulary * config.width

    def seconds(site: CallSite) -> tuple[float, float]:
        per_token = block if isinstance(site.module, Block) else head if site.name == "head" else 0
        forward_s = per_token * batch * seq / flop_s
        return forward_s, 3 * forward_s  # once more to recompute, twice for the gradients

    return seconds


def simulate_regime(
    regime: Regime, feature: Feature, seconds: tuple[float, float], *, call_s: float = 0.0, steps: int = 5
) -> SimulatedStep:
    """The step that `schedule_table` measures, on the virtual clock.

    Args:
        seconds: compute of a step, of its forwards and of the rest; see `schedule_table.compute_seconds`.
        call_s: what the training thread spends on each call besides; see `call_seconds`.
    """
    config = config_of(regime, feature)
    with torch.device("meta"):
        model = regime.model()
    num_calls = regime.num_units * regime.micro_batches

    def of_call(site: CallSite) -> tuple[float, float]:
        return seconds[0] / num_calls, seconds[1] / num_calls

    vertical = not feature.horizontal
    with Simulation(model, AdamW(), config.rig, config, of_call, call_s=call_s, vertical=vertical) as simulation:
        return simulation.run(steps)


def call_seconds(regime: Regime, steps: int = 5) -> float:
    """Seconds that this machine spends on one call of a unit besides compute and waiting: the median over real steps
    of the regime's model with everything in memory, as fast as it goes."""
    fast = dict.fromkeys(("compute_s", "read_s", "write_s", "h2d_s", "d2h_s", "update_s"), 0.0)
    bare = replace(regime, **fast, homes=IN_MEMORY, rows=None)  # type: ignore[arg-type]
    with OffloadEngine(bare.model(), AdamW(lr=1e-5), config_of(bare, AS_IT_IS)) as engine:
        infos = []
        for _ in range(2 + steps):
            for _ in range(regime.micro_batches):
                engine.backward(engine(batch_of(bare)))
            infos.append(engine.step())
    spent = [info.seconds - sum(info.exposed_s.values()) for info in infos[2:]]
    return statistics.median(spent) / (2 * regime.num_units * regime.micro_batches)
