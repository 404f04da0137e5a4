"""`offload probe --rig`: the machine as a rig that everything which takes rigs can read."""

from pathlib import Path

import pytest

from offload.bench.cli import main
from offload.config import usable_cores
from offload.scheduler.rig import Rig


def test_the_probe_writes_a_rig_that_a_simulation_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "here.toml"
    assert main(["probe", str(tmp_path / "drive"), "--seconds", "0.2", "--rig", str(file)]) == 0
    rig = Rig.read(file)
    assert rig.cores.count == usable_cores()
    assert rig.drive is not None
    assert rig.drive.law == "mixed"
    assert 1e6 < rig.cores.update_elements_s < 1e11
    assert 0.1 < rig.cores.dram_gb_s < 1e4
    assert 1e8 < rig.compute.flop_s < 1e16
    assert rig.to_toml() in capsys.readouterr().out
    assert main(["simulate", "--rig", str(file), "--model", "tiny", "--seq", "64"]) == 0


def test_a_rig_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    assert main(["probe", str(tmp_path / "drive"), "--rig", str(tmp_path / "missing" / "here.toml")]) == 2
    assert not (tmp_path / "drive").exists()
