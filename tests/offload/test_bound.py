"""The bound's bytes are those of the byte table, and its seconds follow from them by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from offload.bound import Bound, StepWork, Work, lower_bound, step_work, update_share
from offload.layout import UnitLayout
from offload.scheduler.rig import ComputeSpeed, CoreSpeed, DriveSpeed, LinkSpeed, Rig, TierSizes
from offload.units import ParameterInfo, Unit

NUMEL = 125 * 10**6
NUM_UNITS = 8
P = NUMEL * NUM_UNITS  # 1e9 parameters

S = {"param": "nvme", "states": "nvme", "grad": "host"}
SH = {"param": "host", "states": "nvme", "grad": "host"}
HOST = {"param": "host", "states": "host", "grad": "host"}
ALL = {"param": "nvme", "states": "nvme", "grad": "nvme"}


def layouts(
    *, micro_batches: int = 1, dtype: torch.dtype = torch.bfloat16, numel: int = NUMEL, num: int = NUM_UNITS
) -> list[UnitLayout]:
    made = []
    for index in range(num):
        parameter = nn.Parameter(torch.empty(numel, device="meta", dtype=dtype))
        info = ParameterInfo(parameter, (f"blocks.{index}.weight",), dtype, torch.Size([numel]), True)
        made.append(UnitLayout(Unit(index, f"blocks.{index}", (info,)), ("exp_avg", "exp_avg_sq"), micro_batches > 1))
    return made


def work(home: Mapping[str, str], *, micro_batches: int = 1, **options) -> StepWork:
    options = {"one_memory": True, **options}
    made = layouts(micro_batches=micro_batches, dtype=options.pop("dtype", torch.bfloat16))
    return step_work(made, [home] * NUM_UNITS, micro_batches=micro_batches, **options)


def rig(
    read: float = math.inf,
    write: float = math.inf,
    law: str = "duplex",
    link: tuple[float, float] | None = None,
    mixed: float | None = None,
    update: float = math.inf,
    count: int = 1,
    dram: float = math.inf,
) -> Rig:
    return Rig(
        name="a rig",
        drive=DriveSpeed(read_gb_s=read, write_gb_s=write, law=law, latency_s=0.0, depth=8, mixed_gb_s=mixed),
        link=LinkSpeed(h2d_gb_s=link[0], d2h_gb_s=link[1]) if link else None,
        cores=CoreSpeed(count=count, update_elements_s=update, dram_gb_s=dram),
        compute=ComputeSpeed(flop_s=1e12),
        sizes=TierSizes(host=1, nvme=1, device=1 if link else 0),
    )


def per_parameter(nbytes: float) -> float:
    return round(nbytes / P, 3)


@pytest.mark.parametrize(
    ("home", "commit_interval", "read", "write"),
    [
        (SH, None, 10, 10),
        (SH, 1, 10, 12),
        (SH, 4, 10, 10.5),
        (S, None, 14, 12),
        (S, 1, 14, 12),
        (HOST, None, 0, 0),
        (HOST, 1, 0, 12),
        (ALL, None, 16, 14),
    ],
)
def test_drive_bytes_per_parameter_are_those_of_the_table(
    home: Mapping[str, str], commit_interval: int | None, read: float, write: float
) -> None:
    total = work(home, commit_interval=commit_interval).total
    assert (per_parameter(total.read), per_parameter(total.write)) == (read, write)
    assert (total.h2d, total.d2h) == (0, 0)


def test_fp32_parameters_are_their_own_master() -> None:
    total = work(ALL, dtype=torch.float32).total
    assert (per_parameter(total.read), per_parameter(total.write)) == (20, 16)


@pytest.mark.parametrize(
    ("micro_batches", "vertical", "h2d", "d2h", "read"),
    [(1, True, 4, 2, 14), (4, True, 4, 4, 14), (2, False, 8, 4, 18), (4, False, 16, 8, 26)],
)
def test_link_bytes_grow_with_micro_batches_only_where_each_fetches_for_itself(
    micro_batches: int, vertical: bool, h2d: int, d2h: int, read: int
) -> None:
    total = work(S, micro_batches=micro_batches, vertical=vertical, one_memory=False).total
    assert (per_parameter(total.h2d), per_parameter(total.d2h)) == (h2d, d2h)
    assert (per_parameter(total.read), per_parameter(total.write)) == (read, 12)


def test_gradients_on_the_drive_are_summed_there() -> None:
    total = work(ALL, micro_batches=3, vertical=False).total
    # params 6 * 2, states 10, fp32 sums: read back twice to add and once to update, written three times
    assert (per_parameter(total.read), per_parameter(total.write)) == (12 + 10 + 12, 12 + 12)


def test_what_stays_when_a_pass_turns_around_is_not_fetched_again() -> None:
    kept = P // 4 * 2  # a quarter of the parameters
    one_memory = work(S, reuse_nbytes=kept).total
    assert per_parameter(one_memory.read) == 14 - 2 * 0.5
    device = work(S, reuse_nbytes=kept, one_memory=False).total
    assert (per_parameter(device.read), per_parameter(device.h2d)) == (14 - 0.5, 4 - 0.5)
    everything = work(S, reuse_nbytes=100 * P).total
    assert per_parameter(everything.read) == 10


def test_dram_bytes_are_those_of_the_table() -> None:
    """Sh with a link: states 40, gradient 2 + 2, parameters 2 + 2 for the update and 4 for two uploads."""
    assert per_parameter(work(SH, one_memory=False).total.dram) == pytest.approx(52, abs=0.002)


@pytest.mark.parametrize(
    ("read", "write", "sh", "s"),
    [
        (6.9, 5.0, (2.00, 3.45), (2.40, 4.43)),
        (10, 5, (2.00, 3.00), None),
        (27, 11, (0.91, 1.28), None),
        (48, 26, (0.38, 0.59), None),
        (78, 41, (0.24, 0.37), None),
    ],
)
def test_seconds_per_1e9_parameters_are_those_of_the_table(
    read: float, write: float, sh: tuple[float, float], s: tuple[float, float] | None
) -> None:
    for home, expected in ((SH, sh), (S, s)):
        for law, seconds in zip(("duplex", "additive"), expected or (), strict=False):
            bound = bound_of(work(home), rig(read, write, law))
            assert bound.global_s == pytest.approx(seconds, abs=0.006)
            assert bound.lane == "drive"


def bound_of(step: StepWork, on: Rig, forward_s: float = 0.0, backward_s: float = 0.0, alpha=None, **kw) -> Bound:
    return lower_bound(step, on, forward_s=forward_s, backward_s=backward_s, alpha=alpha, **kw)


def test_an_update_tied_to_forward_adds_the_phases() -> None:
    """Reads 10 GB at 10 GB/s = 1 s, all in forward, beside 0.4 s of compute; backward computes for 0.8 s."""
    step, on = work(SH), rig(read=10, write=20)
    tied = bound_of(step, on, 0.4, 0.8, alpha=1.0)
    assert tied.bound_s == tied.phase_s == pytest.approx(1.0 + 0.8, rel=1e-3)
    assert tied.global_s == pytest.approx(1.2)
    free = bound_of(step, on, 0.4, 0.8)
    assert free.bound_s == free.global_s == free.phase_s == pytest.approx(1.2)
    assert bound_of(step, on, 0.4, 0.8, alpha=0.0).bound_s == pytest.approx(0.4 + 1.0, rel=1e-3)
    assert bound_of(step, on, 0.4, 0.8, alpha=0.3).bound_s == pytest.approx(0.4 + 0.8, rel=1e-3)


def test_parameters_on_the_drive_are_read_in_both_phases() -> None:
    """S: forward reads 2 + 10 and writes 12, backward reads 2; 1 GB/s, so bytes per parameter are seconds."""
    bound = bound_of(work(S), rig(read=1, write=1), alpha=1.0)
    assert bound.forward_s["read"] == pytest.approx(12, rel=1e-3)
    assert bound.backward_s["read"] == pytest.approx(2, rel=1e-3)
    assert bound.phase_s == pytest.approx(14, rel=1e-3)


def test_commits_lie_where_they_cost_least() -> None:
    """10 s of states in forward beside 12 s of compute: 2 s of the 2 s of commit fit there; with 11 s, one of them."""
    step, on = work(SH, commit_interval=1), rig(read=math.inf, write=1)
    assert bound_of(step, on, 12.0, 0.5, alpha=1.0).bound_s == pytest.approx(12.5, rel=1e-3)
    assert bound_of(step, on, 11.0, 1.0, alpha=1.0).bound_s == pytest.approx(12.0, rel=1e-3)
    assert bound_of(step, on, 10.0, 0.0, alpha=1.0).bound_s == pytest.approx(12.0, rel=1e-3)


@pytest.mark.parametrize(
    ("on", "lane", "seconds"),
    [
        (rig(link=(2, math.inf)), "h2d", 4 / 2),
        (rig(link=(math.inf, 0.5)), "d2h", 2 / 0.5),
        (rig(link=(math.inf, math.inf), update=1e8, count=5), "cpu", 2.0),
        (rig(link=(math.inf, math.inf), dram=26), "dram", 2.0),
        (rig(link=(math.inf, math.inf), read=100, write=100, law="mixed", mixed=10), "drive", 2.0),
        (rig(link=(math.inf, math.inf)), "compute", 0.9),
    ],
)
def test_each_lane_can_be_the_slowest(on: Rig, lane: str, seconds: float) -> None:
    bound = bound_of(work(SH, one_memory=False), on, 0.3, 0.6)
    assert (bound.lane, bound.bound_s) == (lane, pytest.approx(seconds, rel=1e-3))


def test_cores_that_compute_and_update_do_one_after_the_other() -> None:
    bound = bound_of(work(SH), rig(update=1e9, count=2), 0.3, 0.6, compute_on_cores=True)
    assert (bound.lane, bound.bound_s) == ("cpu", pytest.approx(0.3 + 0.6 + 0.5, rel=1e-3))


def test_padding_counts() -> None:
    made = layouts(numel=100, num=3)
    total = step_work(made, [SH] * 3, one_memory=True).total
    assert total.read == 3 * made[0].nbytes("states") == 3 * 20480
    assert total.elements == 3 * 2048


def test_a_link_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="one memory"):
        bound_of(work(SH, one_memory=False), rig())
    with pytest.raises(ValueError, match=r"alpha is 1.5"):
        bound_of(work(SH), rig(), alpha=1.5)


@pytest.mark.parametrize(
    ("update", "clips", "share"),
    [
        ("next_forward", True, 1.0),
        ("next_forward", False, None),
        ("backward", False, None),
        ("speculative", True, None),
        ("speculative", False, None),
    ],
)
def test_only_a_norm_that_is_waited_for_ties_the_update_to_forward(
    update: str, clips: bool, share: float | None
) -> None:
    assert update_share(update, clips=clips) == share


amounts = st.floats(0, 1e12)
works = st.builds(Work, read=amounts, write=amounts, elements=amounts, dram=amounts)
speeds = st.floats(0.1, 1e3)


@given(
    parts=st.lists(works, min_size=4, max_size=4),
    read=speeds,
    write=speeds,
    law=st.sampled_from(("duplex", "additive")),
    seconds=st.tuples(st.floats(0, 1e3), st.floats(0, 1e3)),
    alphas=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_tying_the_update_never_makes_a_step_shorter(
    parts: Sequence[Work], read: float, write: float, law: str, seconds: tuple[float, float], alphas
) -> None:
    step = StepWork(forward=parts[0], backward=parts[1], update=parts[2], commit=parts[3])
    on = rig(read, write, law, update=1e9, dram=50.0)
    free = bound_of(step, on, *seconds)
    for alpha in alphas:
        assert bound_of(step, on, *seconds, alpha=alpha).phase_s >= free.global_s * (1 - 1e-9)
