"""The table's arithmetic: rigs that are as slow as a regime says, bounds by hand, ratios; and paced engines' bits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from offload import AdamW, OffloadConfig, OffloadEngine
from offload.bench import rigs
from offload.bench.models.paced import PacedStack, Pacer
from offload.bench.paced import PacedConfig
from offload.bench.regimes import REGIMES, Regime, regime
from offload.bench.schedule_table import AS_IT_IS, FEATURES, bound_of, compute_seconds, config_of, head, line, row_of
from offload.scheduler.trace import LANES

SMALL = {"num_units": 4, "width": 64}
ON_NVME = {"param": "nvme", "states": "nvme", "grad": "host"}
IN_MEMORY = {"param": "host", "states": "host", "grad": "host"}


@pytest.mark.parametrize("one", REGIMES, ids=lambda one: one.name)
def test_every_regime_has_a_rig_whose_lanes_take_the_seconds_it_says(one: Regime) -> None:
    states, param = 10 * one.numel, 2 * one.numel
    on_drive = one.homes["param"] == "nvme"
    rig = one.rig()
    read, write = (states + 2 * param) if on_drive else states, (states + param) if on_drive else states
    if one.uses_nvme:
        taken = rig.service_s(read, write)
        expected = one.read_s + one.write_s if one.law == "additive" else max(one.read_s, one.write_s)
        assert taken == pytest.approx(expected)
    if one.update_s:
        assert one.numel / (rig.cores.count * rig.cores.update_elements_s) == pytest.approx(one.update_s)
    assert (rig.link is not None) == one.link == (one.h2d_s > 0)


def test_there_are_at_least_eight_regimes_two_of_them_with_true_products() -> None:
    assert len({one.name for one in REGIMES}) == len(REGIMES) >= 8
    assert sum(one.rows is not None for one in REGIMES) == 2
    with pytest.raises(ValueError, match="no regime 'warp'; expected one of 'compute'"):
        regime("warp")


def test_the_bound_of_a_regime_is_that_of_its_phases() -> None:
    """Forward 0.1 s beside 0.6 s of reads, then 0.3 s of backward; the global bound is the slowest lane alone."""
    one = Regime(name="read", compute_s=0.4, read_s=0.6, write_s=0.3, update_s=0.1, **SMALL)
    bound = bound_of(one, compute_seconds(one))
    assert bound.bound_s == pytest.approx(0.6 + 0.3)
    assert (bound.global_s, bound.lane) == (pytest.approx(0.6), "drive")


def test_modes_that_do_not_wait_for_the_norm_have_the_global_bound() -> None:
    one = Regime(name="write", compute_s=0.4, read_s=0.3, write_s=0.5, **SMALL)
    by_name = {feature.update: feature for feature in FEATURES if feature.own_bound}
    assert bound_of(one, (0.1, 0.3), by_name["backward"]).bound_s == pytest.approx(0.5)
    durable = bound_of(one, (0.1, 0.3), by_name["speculative"])
    assert durable.bound_s == pytest.approx(0.5 * 12 / 10)  # each commit writes the parameters too


def test_a_device_that_keeps_a_few_units_fetches_the_others_twice() -> None:
    one = Regime(name="link", compute_s=0.1, h2d_s=0.8, d2h_s=0.2, homes=IN_MEMORY, link=True, num_units=16, width=64)
    bound = bound_of(one, compute_seconds(one))
    assert bound.forward_s["h2d"] == pytest.approx(0.4)
    assert bound.backward_s["h2d"] == pytest.approx(0.4 * 12 / 16)  # four of sixteen stay


def test_features_apply_where_a_regime_has_what_they_switch_off() -> None:
    by_name = {feature.name: feature for feature in FEATURES}
    in_memory = Regime(name="optimizer", compute_s=0.1, homes=IN_MEMORY)
    states = Regime(name="read", compute_s=0.1)
    assert not by_name["off: duplex"].applies(in_memory) and by_name["off: duplex"].applies(states)
    assert not by_name["off: duplex"].applies(Regime(name="shared", compute_s=0.1, law="additive"))
    assert not by_name["off: window, one unit"].applies(in_memory)
    assert not by_name["off: vertical"].applies(states)
    assert by_name["off: vertical"].applies(Regime(name="m", compute_s=0.1, micro_batches=2))
    assert not by_name["speculative, every step durable"].applies(in_memory)
    assert all(by_name[name].applies(in_memory) for name in (AS_IT_IS.name, "off: step() waits"))


def test_without_duplex_reads_and_writes_take_turns_on_the_same_drive() -> None:
    one = Regime(name="duplex", compute_s=0.1, read_s=0.5, write_s=0.5, **SMALL)
    (off,) = (feature for feature in FEATURES if feature.in_turns)
    as_it_is, in_turns = config_of(one, AS_IT_IS).rig.drive, config_of(one, off).rig.drive
    assert (as_it_is.law, in_turns.law) == ("duplex", "additive")
    assert (as_it_is.read_gb_s, as_it_is.write_gb_s) == (in_turns.read_gb_s, in_turns.write_gb_s)


def test_the_smallest_window_has_room_for_one_unit() -> None:
    one = Regime(name="params", compute_s=0.0, homes=ON_NVME, **SMALL)
    (off,) = (feature for feature in FEATURES if feature.smallest)
    least, ample = config_of(one, off), config_of(one, AS_IT_IS)
    assert least.host_memory < ample.host_memory
    with pytest.raises(ValueError, match="host_memory"):
        OffloadEngine(one.model(), AdamW(), PacedConfig(**{**vars(least), "host_memory": least.host_memory - 1}))


def test_a_row_has_the_median_over_the_bound() -> None:
    one = Regime(name="read", compute_s=0.4, read_s=0.6, write_s=0.3, **SMALL)
    infos = [
        SimpleNamespace(seconds=seconds, exposed_s=dict.fromkeys(LANES, seconds / 10)) for seconds in (1.8, 1.2, 0.9)
    ]
    row = row_of(one, AS_IT_IS, bound_of(one, compute_seconds(one)), infos)
    assert row.step_s[1] == 1.2 and row.bound_ratio == pytest.approx(1.2 / 0.9)
    assert row.exposed_s["read"] == pytest.approx(0.13)
    table = [*head(), line(row)]
    assert len({words.count("|") for words in table}) == 1
    assert "| read | update in the next forward | 1.200 [1.020, 1.560] | 0.900 | 1.33 | 0.600 | drive |" in table[2]


def test_a_pacer_keeps_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sleep runs over by a quarter of a second; five calls of one second end at 5.25 and not at 6.25."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    monkeypatch.setattr("time.sleep", lambda seconds: now.__setitem__(0, now[0] + seconds + 0.25))
    pacer = Pacer()
    for _ in range(5):
        pacer.end(pacer.begin(1.0))
    assert now[0] == 5.25


def test_a_paced_layer_has_the_gradients_of_its_formula() -> None:
    torch.manual_seed(0)
    stack = PacedStack(2, 8, 0.0, 0.0)
    batch = torch.randn(3, 8)
    stack(batch).backward()
    weights = [layer.weight.detach().clone().requires_grad_() for layer in stack.layers]
    x = batch
    for weight in weights:
        x = x + nn.functional.linear(x, weight)
    x.square().mean().backward()
    for layer, weight in zip(stack.layers, weights, strict=True):
        torch.testing.assert_close(layer.weight.grad, weight.grad)


@pytest.mark.parametrize("link", [False, True])
def test_a_paced_engine_has_the_bits_of_one_that_is_not(link: bool) -> None:
    one = Regime(
        name="r", compute_s=0.0, read_s=0.01, write_s=0.01, update_s=0.01, homes=ON_NVME, link=link, **SMALL,
        h2d_s=0.01 if link else 0.0, d2h_s=0.01 if link else 0.0,
    )  # fmt: skip
    plain = OffloadConfig(device="cpu", clip_grad_norm=1e6, host_memory="256MiB")
    batch = torch.randn(1, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = []
    for config in (plain, config_of(one, AS_IT_IS)):
        torch.manual_seed(0)
        with OffloadEngine(PacedStack(4, 64, 0.0, 0.0), AdamW(lr=1e-2), config) as engine:
            for _ in range(2):
                engine.backward(engine(batch))
                info = engine.step()
            found.append(engine.state_dict())
    assert info.nbytes["read"] >= 10 * one.numel, "states come from the drive"
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


def test_rigs_of_the_package_can_be_read_and_name_their_tiers() -> None:
    assert len(rigs.names()) >= 4
    for name in rigs.names():
        rig = rigs.find(name)
        assert rig.drive is not None and rig.one_memory == (rig.sizes.device == 0)
    assert rigs.find(str(rigs.FOLDER / "laptop-8gb.toml")) == rigs.find("laptop-8gb")
    with pytest.raises(ValueError, match=r"rig 'nope' is neither a file nor one of cores-2, desktop-24gb"):
        rigs.find("nope")
