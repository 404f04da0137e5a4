"""Which implementation runs, and what is said when it is not the fast one."""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from offload.kernels import dispatch
from offload.kernels.native import build, library


def test_native_runs_where_there_is_a_compiler() -> None:
    assert build.find_compiler() is not None, "these tests need a C compiler"
    assert dispatch.implementation() == "native"
    assert dispatch.why_not_native() is None


def test_use_forces_and_restores() -> None:
    with dispatch.use("reference"):
        assert dispatch.implementation() == "reference"
        assert "switched off" in str(dispatch.why_not_native())
        with dispatch.use("native"):
            assert dispatch.implementation() == "native"
        with dispatch.use("numba"):
            assert "OFFLOAD_KERNELS or use() says numba" in str(dispatch.why_not_native())
    assert dispatch.implementation() == "native"
    with pytest.raises(ValueError, match="no implementation 'fast'"), dispatch.use("fast"):
        pass


@pytest.mark.parametrize("word,outcome", [("reference", "reference"), ("native", "native"), ("fast", "ValueError")])
def test_the_environment_forces(word: str, outcome: str) -> None:
    program = (
        "from offload.kernels import dispatch\n"
        "try: print(dispatch.implementation())\n"
        "except ValueError as error: print('ValueError' if repr('fast') in str(error) else error)"
    )
    environment = os.environ | {"OFFLOAD_KERNELS": word}
    result = subprocess.run(
        [sys.executable, "-P", "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == [outcome]


WITHOUT_COMPILER = """
import logging, sys, torch
sys.modules["numba"] = None  # as if it were not installed
logging.basicConfig(format="%(levelname)s %(message)s")
from offload.kernels import dispatch
from offload.kernels.gradient import squared_norm
assert dispatch.implementation() == "reference"
assert squared_norm(torch.full((5,), 2.0)) == 20.0
assert squared_norm(torch.full((5,), 2.0)) == 20.0
print(dispatch.why_not_native())
with dispatch.use("native"):
    try:
        dispatch.implementation()
    except RuntimeError as error:
        print("RuntimeError", error)
"""


def test_without_a_compiler_one_line_says_so_and_torch_computes(tmp_path: Path) -> None:
    package = Path(library.__file__).parent.parent
    copy = tmp_path / "offload" / "kernels"  # without the library that may lie beside the package
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / "offload" / "__init__.py").touch()
    environment = os.environ | {
        "CC": str(tmp_path / "no-such-compiler"),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "PYTHONPATH": str(tmp_path),
    }
    result = subprocess.run(
        [sys.executable, "-P", "-c", WITHOUT_COMPILER], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("WARNING") == 1
    assert "plain torch" in result.stderr and "install gcc or clang" in result.stderr
    assert "pip install numba" in result.stderr
    assert "No C compiler" in result.stdout and "RuntimeError The native kernels were asked for" in result.stdout


def test_build_reports_the_compilers_words(tmp_path: Path) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho 'fatal: out of ink' >&2\nexit 3\n")
    compiler.chmod(0o755)
    with pytest.raises(build.BuildError, match="out of ink"):
        build.build(tmp_path / "out", cc=str(compiler))
    assert list((tmp_path / "out").iterdir()) == []


def test_a_library_of_another_version_is_not_used(tmp_path: Path) -> None:
    """A stale library beside the package would compute yesterday's formula."""
    source = tmp_path / "old.c"
    names = [name for name in library.SIGNATURES if name != "source_hash"]
    functions = "".join(f"void offl_{name}(void) {{}}\n" for name in names)
    source.write_text('const char *offl_source_hash(void) { return "0000"; }\n' + functions)
    command = build.find_compiler()
    assert command is not None
    old = tmp_path / build.LIBRARY_NAME
    subprocess.run([*command, "-shared", "-fPIC", str(source), "-o", str(old)], check=True)
    assert library._open_current(old) is None
    assert library._open_current(tmp_path / "missing.so") is None
    garbage = tmp_path / "garbage.so"  # another file: the old library is mapped, writing into it would end the process
    garbage.write_bytes(b"not a library")
    assert library._open_current(garbage) is None


def test_cuda_and_other_devices_never_take_the_cpu_library() -> None:
    with dispatch.use("native"):
        assert dispatch.backend(torch.device("meta")).__name__.endswith("reference")


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """The devices that were tuned, on a machine without CUDA: what would be called there is replaced."""
    calls: list[torch.device] = []
    monkeypatch.setattr(dispatch, "uses_triton", lambda device: True)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(importlib, "import_module", lambda *names: SimpleNamespace(tune=calls.append))
    dispatch.tune_once.cache_clear()
    return calls


def test_kernels_are_tuned_once_for_each_gpu(tuned: list[torch.device]) -> None:
    for name in ("cuda:0", "cuda:1", "cuda:0", "cpu", "xpu:0"):
        dispatch.tune_once(torch.device(name))
    assert tuned == [torch.device("cuda:0"), torch.device("cuda:1")]


def test_kernels_that_do_not_run_are_not_tuned(tuned: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "uses_triton", lambda device: False)
    dispatch.tune_once(torch.device("cuda:0"))
    assert tuned == []


def test_tuning_that_fails_is_one_line_in_the_log(
    tuned: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def tune(device: torch.device) -> None:
        raise torch.OutOfMemoryError("1.7 GB")

    monkeypatch.setattr(importlib, "import_module", lambda *names: SimpleNamespace(tune=tune))
    for _ in range(2):
        dispatch.tune_once(torch.device("cuda:0"))
    (record,) = caplog.records
    assert "cuda:0 keep their default launch shape" in record.getMessage()
    assert "OutOfMemoryError: 1.7 GB" in record.getMessage()
