"""The engine's schedule in virtual time: steps whose length is known, and thousands of machines without a deadlock.

P is the number of parameters. A split master moves 10 bytes of states per parameter each way (low half and two moments)
and 2 of parameters, gradients being kept in 2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from offload import AdamW, BudgetTooSmall
from offload.scheduler.rig import ComputeSpeed, CoreSpeed, DriveSpeed, LinkSpeed, Rig, TierSizes
from offload.simulation import Simulation, simulated_config
from offload.units import CallSite

AMPLE = 1 << 40
IN_MEMORY = {"param": "host", "states": "host", "grad": "host"}
STATES_ON_NVME = {"param": "host", "states": "nvme", "grad": "host"}
ALL_ON_NVME = {"param": "nvme", "states": "nvme", "grad": "nvme"}
NUM_UNITS, WIDTH = 100, 512
P = NUM_UNITS * WIDTH**2


class Stack(nn.Module):
    """Linear maps [N, N], each a unit of its own, without values."""

    def __init__(self, widths: Sequence[int], frozen: Sequence[int] = ()) -> None:
        super().__init__()
        with torch.device("meta"):
            self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for width in widths)
        for index in frozen:
            self.layers[index].weight.requires_grad_(False)


def rig(*, law: str = "duplex", link: bool = False, **speeds: float) -> Rig:
    """A rig that is infinitely fast at everything but what is given."""

    def speed(name: str) -> float:
        return speeds.get(name, math.inf)

    return Rig(
        name="a rig",
        cores=CoreSpeed(
            count=int(speeds.get("count", 2)),
            update_elements_s=speed("update_elements_s"),
            dram_gb_s=speed("dram_gb_s"),
        ),
        compute=ComputeSpeed(flop_s=math.inf),
        sizes=TierSizes(host=AMPLE, device=AMPLE if link else 0, nvme=AMPLE),
        drive=DriveSpeed(
            read_gb_s=speed("read_gb_s"),
            write_gb_s=speed("write_gb_s"),
            law=law,
            latency_s=speeds.get("latency_s", 0.0),
            depth=int(speeds.get("depth", 8)),
            mixed_gb_s=speeds["mixed_gb_s"] if law == "mixed" else None,
        ),
        link=LinkSpeed(h2d_gb_s=speed("h2d_gb_s"), d2h_gb_s=speed("d2h_gb_s")) if link else None,
    )


def step_s(machine: Rig, homes: Mapping[str, str], forward_s: float = 0.0, backward_s: float = 0.0, **kw: Any) -> float:
    """Seconds of a step of 100 equal units in the long run; the two are compute of a whole step."""

    def seconds(site: CallSite) -> tuple[float, float]:
        return forward_s / NUM_UNITS, backward_s / NUM_UNITS

    config = simulated_config(machine, **{"homes": homes, "durability": "none", "host_memory": 4 << 30, **kw})
    with Simulation(Stack([WIDTH] * NUM_UNITS), AdamW(), machine, config, seconds) as simulation:
        return simulation.run(3).seconds


# -- lengths that are known


def test_compute_alone() -> None:
    assert step_s(rig(), IN_MEMORY, 1.0, 3.0) == pytest.approx(4.0, rel=1e-9)


def test_what_the_training_thread_does_beside_compute_is_time_but_no_compute() -> None:
    config = simulated_config(rig(), homes=IN_MEMORY, durability="none")
    with Simulation(Stack([64] * 5), AdamW(), rig(), config, lambda site: (1.0, 2.0), call_s=0.25) as simulation:
        step = simulation.run(3)
    assert (step.compute_s, step.seconds) == pytest.approx((15.0, 17.5))


@pytest.mark.parametrize(("vertical", "fetches"), [(True, 2), (False, 8)])
def test_turns_fetch_a_unit_once_for_all_micro_batches(vertical: bool, fetches: int) -> None:
    """The device has room for one unit, which stays where a pass turns."""
    machine = rig(link=True)
    config = simulated_config(
        machine, homes=IN_MEMORY, durability="none", micro_batches=4, device_memory=2 * WIDTH**2, update="next_forward"
    )
    module = Stack([WIDTH] * 10)
    with Simulation(module, AdamW(), machine, config, lambda site: (1.0, 2.0), vertical=vertical) as simulation:
        step = simulation.run(3)
        bound = simulation.bound()
    assert step.compute_s == pytest.approx(10 * 4 * 3.0)
    turns = fetches - 1
    assert step.nbytes["h2d"] == (10 * fetches - turns) * 2 * WIDTH**2
    assert bound.busy_s["compute"] == pytest.approx(step.compute_s)


def test_reads_alone() -> None:
    assert step_s(rig(read_gb_s=0.1), STATES_ON_NVME) == pytest.approx(10 * P / 0.1e9, rel=0.01)


def test_writes_alone() -> None:
    assert step_s(rig(write_gb_s=0.1), STATES_ON_NVME) == pytest.approx(10 * P / 0.1e9, rel=0.01)


@pytest.mark.parametrize(("law", "seconds"), [("duplex", 10.0 / 0.1), ("additive", 10 / 0.1 + 10 / 0.2), ("mixed", 50)])
def test_reads_and_writes_by_the_law_of_the_drive(law: str, seconds: float) -> None:
    machine = rig(read_gb_s=0.1, write_gb_s=0.2, law=law, mixed_gb_s=0.4)
    assert step_s(machine, STATES_ON_NVME) == pytest.approx(seconds * P / 1e9, rel=0.01)


def test_the_update_alone() -> None:
    assert step_s(rig(update_elements_s=1e7), IN_MEMORY) == pytest.approx(P / 2e7, rel=0.01)
    assert step_s(rig(update_elements_s=1e7, count=1), IN_MEMORY) == pytest.approx(P / 1e7, rel=0.01)


def test_the_link_to_the_device_alone() -> None:
    """Down in forward and in backward, but for what stays at the turn: the units that the device has room for."""
    machine, room = rig(link=True, h2d_gb_s=0.1), 4
    seconds = step_s(machine, IN_MEMORY, device_memory=room * 2 * WIDTH**2)
    least, most = ((2 * NUM_UNITS - stays) * 2 * WIDTH**2 / 0.1e9 for stays in (room, 0))
    assert least * 0.999 <= seconds <= most * 1.001
    assert least > 0.97 * most


def test_the_link_from_the_device_alone() -> None:
    assert step_s(rig(link=True, d2h_gb_s=0.1), IN_MEMORY, device_memory=AMPLE) == pytest.approx(
        2 * P / 0.1e9, rel=0.01
    )


def test_host_memory_alone() -> None:
    """In one memory: gradients are copied (4), states (10) and parameters (2) read and written, gradients read (2)."""
    assert step_s(rig(dram_gb_s=1.0), IN_MEMORY) == pytest.approx((4 + 2 * 12 + 2) * P / 1e9, rel=0.01)


def test_the_update_hides_behind_the_next_forward_and_not_where_the_step_waits_for_it() -> None:
    machine = rig(read_gb_s=1.0, write_gb_s=1.0)
    moved_s = 10 * P / 1e9
    hidden = step_s(machine, STATES_ON_NVME, 2 * moved_s, 2 * moved_s)
    assert hidden == pytest.approx(4 * moved_s, rel=0.03)
    waited = step_s(machine, STATES_ON_NVME, 2 * moved_s, 2 * moved_s, update="step")
    assert waited == pytest.approx(5 * moved_s, rel=0.03)


@pytest.mark.parametrize(("flush_s", "seconds"), [(0.0, 4.0), (3.5, 4.0), (6.0, 6.0)])
def test_a_flush_costs_nothing_until_it_takes_longer_than_a_step(flush_s: float, seconds: float) -> None:
    """The step's updates wait for the commit of the step before, which has had a forward and a backward."""
    machine = rig()
    config = simulated_config(machine, homes=STATES_ON_NVME, durability="step", host_memory=4 << 30)
    module = Stack([WIDTH] * NUM_UNITS)
    with Simulation(module, AdamW(), machine, config, lambda site: (0.01, 0.03), flush_s=flush_s) as simulation:
        assert simulation.run(4).seconds == pytest.approx(seconds, rel=1e-3)


def least(widths: Sequence[int], machine: Rig, **settings: Any) -> Simulation:
    """A simulation with the smallest budgets that work and a little compute."""
    settings = {"host_memory": 1, **({"device_memory": 1} if machine.link is not None else {}), **settings}
    config = simulated_config(machine, **settings)
    while True:
        try:
            return Simulation(
                Stack(widths), AdamW(), machine, config, lambda site: (1e-4, 1e-2), vertical=False, max_turns=100_000
            )
        except BudgetTooSmall as problem:
            config = replace(config, **{problem.setting: problem.needed_nbytes})


def test_a_prefetch_leaves_the_room_to_whoever_waits_for_it() -> None:
    """The device has one slot. Taken by a prefetch for the very unit that is waited for, it would never come free."""
    machine = rig(link=True, read_gb_s=5.0, write_gb_s=1.0, law="additive", update_elements_s=2.5e6, count=1)
    check(least([256, 256], machine, dtype=torch.float32, update="next_forward"), 4)


def test_a_wide_gradient_that_waits_for_room_is_not_starved_by_prefetches() -> None:
    """It needs more than any unit that is evicted for it gives, so room has to be gathered."""
    machine = rig(read_gb_s=4.0, write_gb_s=0.25, law="mixed", mixed_gb_s=1.0, depth=1, dram_gb_s=0.15)
    widths = [2048, 64, 2048, 2048, 256, 1500, 1500, 1024]
    check(least(widths, machine, durability=2, micro_batches=3, update="step", clip_grad_norm=None), 3)


def test_what_is_reported_belongs_to_the_last_step() -> None:
    machine = rig(read_gb_s=0.1)
    config = simulated_config(machine, homes=STATES_ON_NVME, durability="none", host_memory=4 << 30)
    with Simulation(Stack([WIDTH] * NUM_UNITS), AdamW(), machine, config, lambda site: (0.005, 0.01)) as simulation:
        step = simulation.run(3)
        bound = simulation.bound()
    assert step.compute_s == pytest.approx(1.5)
    assert step.nbytes["read"] == step.nbytes["write"] == 10 * P
    assert step.busy_s["read"] == pytest.approx(10 * P / 0.1e9, rel=1e-3)
    assert sum(step.exposed_s.values()) == pytest.approx(step.seconds - step.compute_s, rel=1e-6)
    assert sum(step.waited_s.values()) == pytest.approx(step.seconds - step.compute_s, rel=1e-6)
    assert bound.lane == "drive"
    assert bound.bound_s <= step.seconds


def test_a_model_with_values_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'layers.0.weight' is on cpu.*torch.device\('meta'\)"):
        module = Stack([])
        module.layers.append(nn.Linear(4, 4))
        Simulation(module, AdamW(), rig(), simulated_config(rig()), lambda site: (0.0, 0.0))


def test_a_budget_that_cannot_work_is_refused_as_by_the_engine() -> None:
    config = simulated_config(rig(), host_memory=1 << 20)
    with pytest.raises(BudgetTooSmall, match="smallest host_memory that works"):
        Simulation(Stack([WIDTH]), AdamW(), rig(), config, lambda site: (0.0, 0.0))


# -- machines, models and budgets of every kind

SPEEDS = st.sampled_from([0.05, 0.3, 1.0, 4.0, 30.0])
SECONDS = st.sampled_from([0.0, 1e-4, 1e-2, 0.2])


@st.composite
def rigs(draw: st.DrawFn) -> Rig:
    law = draw(st.sampled_from(["duplex", "additive", "mixed"]))
    speeds = {name: draw(SPEEDS) for name in ("read_gb_s", "write_gb_s", "mixed_gb_s", "h2d_gb_s", "d2h_gb_s")}
    return rig(
        law=law,
        link=draw(st.booleans()),
        **speeds,
        dram_gb_s=draw(st.sampled_from([0.5, 10.0, math.inf])),
        update_elements_s=draw(st.sampled_from([1e6, 1e8, math.inf])),
        count=draw(st.sampled_from([1, 2, 7])),
        latency_s=draw(st.sampled_from([0.0, 1e-4, 1e-2])),
        depth=draw(st.sampled_from([1, 2, 8, 32])),
    )


@st.composite
def simulations(draw: st.DrawFn) -> Simulation:
    """An engine with the smallest budgets that work, or somewhat more."""
    machine = draw(rigs())
    widths = draw(st.lists(st.sampled_from([64, 256, 1024, 1500]), min_size=1, max_size=7))
    frozen = draw(st.lists(st.integers(0, len(widths) - 1), max_size=1)) if len(widths) > 1 else []
    seconds = {f"layers.{index}": (draw(SECONDS), draw(SECONDS)) for index in range(len(widths))}
    tiers = st.sampled_from([None, "host", "nvme"])
    homes = {kind: tier for kind in ("param", "states", "grad") if (tier := draw(tiers)) is not None}
    budgets = {"host_memory": 1}
    if machine.link is not None:
        budgets["device_memory"] = 1
    durability, clip = draw(st.sampled_from(["none", "step", 2])), draw(st.sampled_from([None, 1.0]))
    modes = ["auto", "next_forward", "step"] + ["backward"] * (clip is None) + ["speculative"] * (durability == "step")
    config = simulated_config(
        machine,
        homes=homes,
        update=draw(st.sampled_from(modes)),
        micro_batches=draw(st.sampled_from([1, 1, 2, 3])),
        durability=durability,
        dtype=draw(st.sampled_from([torch.bfloat16, torch.float32])),
        clip_grad_norm=clip,
        **budgets,
    )
    vertical = draw(st.booleans())
    room = draw(st.sampled_from([1.0, 1.05, 1.5, 4.0]))
    for _ in range(8):
        try:
            return Simulation(
                Stack(widths, frozen), AdamW(), machine, config, lambda site: seconds[site.name],
                vertical=vertical, max_turns=100_000,
            )  # fmt: skip
        except BudgetTooSmall as problem:
            # Only what is in the way is raised, and nobody has more than the smallest budget before all is enough.
            config = replace(config, **{problem.setting: int(problem.needed_nbytes * room)})
    raise AssertionError("no budget works")


def check(simulation: Simulation, num_steps: int) -> None:
    """Train; every budget is kept, everything is given back, and no lane did more than it can."""
    with simulation:
        simulation.run(num_steps)
        simulation.settle()
        pools, bound = simulation.pools(), simulation.bound()
        for name, pool in pools.items():
            assert pool.peak_nbytes <= pool.capacity_nbytes, name
            assert pool.leased_nbytes == (simulation.plan.rest_nbytes if name == simulation.rest.name else 0), name
        host = sum(pool.capacity_nbytes for name, pool in pools.items() if name != "device_memory")
        assert host <= simulation.config.host_budget_nbytes()
        least_s = max(bound.busy_s[lane] for lane in ("compute", "h2d", "d2h", "drive", "cpu"))
        assert simulation.time_s >= (num_steps - 1) * least_s * (1 - 1e-9)


QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large]


@settings(max_examples=200, deadline=None, suppress_health_check=QUIET)
@given(simulations())
def test_no_machine_makes_it_stand_still_or_break_a_budget(simulation: Simulation) -> None:
    check(simulation, 3)


@pytest.mark.slow
@pytest.mark.timeout(600)
@settings(max_examples=2000, deadline=None, suppress_health_check=QUIET)
@given(simulations())
def test_thousands_of_machines(simulation: Simulation) -> None:
    check(simulation, 4)
