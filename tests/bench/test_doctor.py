"""`offload doctor` says what is true of this machine, and fails only where nothing can run."""

import json
import os
from pathlib import Path

import pytest
import torch

from offload.bench import doctor
from offload.bench.cli import main
from offload.kernels import dispatch
from offload.kernels.native import library


def report(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, str]:
    """Name -> value of every line that the command prints."""
    assert main(["doctor", *arguments]) == code
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    assert all(line[:4] in ("[+] ", "[-] ") for line in lines)
    return dict(line[4:].split(": ", 1) for line in lines)


def test_numbers_are_those_of_this_machine(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = tmp_path / "limit"
    limit.write_text(f"{3 << 30}\n")
    monkeypatch.setattr(doctor, "CGROUP_LIMIT", limit)
    found = report(capsys, str(tmp_path), "--json", str(tmp_path / "doctor.json"))
    assert found["torch"] == torch.__version__
    assert f"{len(os.sched_getaffinity(0))} cores usable, torch uses {torch.get_num_threads()}" in found["cpu"]
    assert found["host memory"].endswith("cgroup limit 3 GiB")
    assert " GiB, " in found["host memory"] and " available" in found["host memory"]
    assert ("device" in found) == (not torch.accelerator.is_available())
    assert "direct I/O" in found[f"directory {tmp_path}"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["doctor.json", "limit"]  # the trial left nothing
    findings = json.loads((tmp_path / "doctor.json").read_text())["findings"]
    assert {entry["name"]: entry["value"] for entry in findings} == found


def test_a_missing_cgroup_limit_is_told_from_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "limit"
    monkeypatch.setattr(doctor, "CGROUP_LIMIT", limit)
    endings = []
    for text in (None, "max\n"):
        if text is not None:
            limit.write_text(text)
        endings += [found.value.rsplit(" ", 1)[1] for found in doctor.examine([]) if found.name == "host memory"]
    assert endings == ["unknown", "none"]


@pytest.mark.skipif(dispatch.why_not_native() is not None, reason="the native kernels do not run here")
def test_native_kernels_are_named_with_their_instruction_set(capsys: pytest.CaptureFixture[str]) -> None:
    name, isa = report(capsys)["kernels, cpu"].split(", ")
    assert name == "native"
    assert isa in library.ISAS


def test_the_reason_for_slow_kernels_is_given_and_is_no_failure(capsys: pytest.CaptureFixture[str]) -> None:
    with dispatch.use("reference"):
        assert main(["doctor"]) == 0
    output = capsys.readouterr().out.splitlines()
    line = output.index("[-] kernels, cpu: reference, slower")
    assert output[line + 1] == "    The native kernels are switched off: OFFLOAD_KERNELS or use() says reference."


@pytest.mark.parametrize(
    ("numba", "value", "advice"),
    [
        (None, "numba, up to 3 times the CPU time of native", "No C compiler: install gcc."),
        ("Install numba.", "reference, slower", "No C compiler: install gcc. Install numba."),
    ],
)
def test_the_next_best_kernels_are_named_with_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, numba: str | None, value: str, advice: str
) -> None:
    failures = {"native": "No C compiler: install gcc.", "numba": numba}
    monkeypatch.setattr(dispatch, "_load_failure", failures.get)
    assert main(["doctor"]) == 0
    output = capsys.readouterr().out.splitlines()
    line = output.index(f"[-] kernels, cpu: {value}")
    assert output[line + 1] == f"    {advice}"


def test_kernels_that_were_asked_for_but_cannot_run_are_a_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_load_failure", lambda name: "No C compiler.")
    with dispatch.use("native"):
        assert report(capsys, code=2)["kernels, cpu"] == "cannot run"


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="this system has no O_DIRECT")
def test_refused_direct_io_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(backend: object) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(doctor, "prove", refuse)
    finding = doctor.examine([tmp_path])[-1]
    assert finding.value.endswith("direct I/O does not work")
    assert "Invalid argument" in finding.advice and finding.usable


def test_a_path_that_is_no_directory_is_the_users_to_mend(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["doctor", str(tmp_path / "missing")]) == 2
    assert "is not a directory" in capsys.readouterr().err
