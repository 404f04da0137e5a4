"""`offload simulate` and the simulated regimes: compute is that of the model, refusals are one line."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from offload import AdamW
from offload.bench.cli import main
from offload.bench.models.gpt import preset
from offload.bench.regimes import regime
from offload.bench.rigs import find
from offload.bench.schedule_table import AS_IT_IS, Feature, compute_seconds
from offload.bench.simulate import call_seconds, gpt_on_meta, gpt_seconds, simulate_regime
from offload.simulation import Simulation, simulated_config


def test_calls_of_a_gpt_have_all_of_its_operations() -> None:
    config, rig = preset("tiny", context=64), find("desktop-24gb")
    seconds = gpt_seconds(config, batch=3, seq=64, flop_s=1e9)
    with Simulation(gpt_on_meta(config), AdamW(), rig, simulated_config(rig), seconds) as simulation:
        pairs = [seconds(site) for site in simulation.partition.call_sites]
        assert sum(layout.unit.numel for layout in simulation.layouts) == config.num_parameters
        assert simulation.run(2).compute_s == pytest.approx(sum(map(sum, pairs)))
    assert sum(map(sum, pairs)) == pytest.approx(3 * 64 * config.flops_per_token(64, recompute=True) / 1e9)


def test_the_command_prints_the_step_beside_its_bound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "step.json"
    flags = ("--model", "small", "--seq", "128", "--host-memory", "120MiB", "--json", str(file))
    assert main(("simulate", "--rig", "laptop-8gb", *flags)) == 0
    written = json.loads(file.read_text())
    shown = capsys.readouterr().out
    assert f"step                  {written['seconds']:.4g} s" in shown
    assert f"ratio {written['bound_ratio']:.3f}" in shown
    assert written["lane"] == "drive"
    assert written["seconds"] >= written["global_s"]
    parameters = preset("small").num_parameters
    assert 8 * parameters < written["nbytes"]["read"] < 16 * parameters
    assert sum(written["waited_s"].values()) == pytest.approx(written["seconds"] - written["busy_s"]["compute"])


def test_a_rig_in_a_file_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.toml"
    find("cores-2").write(path)
    assert main(("simulate", "--rig", str(path), "--model", "tiny", "--steps", "1")) == 0
    assert "2 cores, one memory" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--rig", "abacus"), "rig 'abacus' is neither a file nor one of cores-2"),
        (("--rig", "cores-2", "--model", "huge"), "No model called 'huge'"),
        (("--rig", "cores-2", "--host-memory", "1MiB"), "smallest host_memory that works"),
        (("--rig", "cores-2", "--device-memory", "1GiB"), "device and host are the same memory"),
        (("--rig", "cores-2", "--update", "tomorrow"), "update='tomorrow'"),
        (("--rig", "cores-2", "--steps", "0"), "'0' is not a whole number of at least 1"),
    ],
)
def test_mistakes_are_named_in_one_line(capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], words: str) -> None:
    assert main(("simulate", *flags)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err.splitlines()[-1]


def test_a_regime_is_simulated_as_it_is_measured() -> None:
    """The optimizer's regime: 0.1 s of forward hide nothing of 0.6 s of updates but what lies in them."""
    one = regime("optimizer")
    seconds = compute_seconds(one)
    waiting = simulate_regime(one, Feature(name="step", update="step"), seconds)
    assert waiting.seconds == pytest.approx(one.compute_s + one.update_s, rel=0.01)
    hidden = simulate_regime(one, AS_IT_IS, seconds)
    assert hidden.compute_s == pytest.approx(sum(seconds))
    assert max(one.update_s, sum(seconds)) < hidden.seconds < waiting.seconds
    assert hidden.busy_s["cpu"] == pytest.approx(one.update_s, rel=0.02)
    slower = simulate_regime(one, Feature(name="step", update="step"), seconds, call_s=0.01)
    assert slower.seconds == pytest.approx(waiting.seconds + 2 * one.num_units * 0.01)


def test_the_time_of_a_call_is_measured_without_the_paces() -> None:
    """Paced, the two units would take half a minute."""
    one = replace(regime("read"), num_units=2, width=64, compute_s=9.0, read_s=9.0)
    assert call_seconds(one, steps=1) > 0
