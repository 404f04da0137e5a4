"""The kernels that numba compiles: all of them are there, and they run wherever numba can keep what it compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from offload.kernels import dispatch
from offload.kernels.jit import library
from offload.kernels.native.calls import Calls
from offload.kernels.native.library import PREFIX, SIGNATURES, LibraryUnavailable

from .bits import HAS_NUMBA, any_values, assert_same_bits

OF_THE_C_LIBRARY = {"limit_isa", "source_hash", "stream"}  # about itself, and the bench's roof

pytestmark = pytest.mark.skipif(not HAS_NUMBA, reason="numba is not installed")


def test_every_kernel_of_the_native_library_is_compiled() -> None:
    assert set(vars(library.load())) == {PREFIX + name for name in SIGNATURES.keys() - OF_THE_C_LIBRARY}
    assert dispatch.available() == ("native", "numba", "reference")


def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-c", program], env=os.environ | environment, capture_output=True, text=True, check=True
    )


WITHOUT_COMPILER = """
import logging, torch
logging.basicConfig(format="%(levelname)s %(message)s")
from offload.kernels.native import build
build.LIBRARY_NAME = "missing.so"
from offload import AdamW, OffloadConfig
from offload.assembly import assemble
from offload.kernels import dispatch
from offload.kernels.jit import library
parts = assemble(torch.nn.Linear(8, 8), AdamW(), OffloadConfig(device="cpu"))  # what an engine does before all else
print(library.load.cache_info().misses, dispatch.implementation(), dispatch.why_not_native())
parts.close()
"""


def test_without_a_compiler_numba_runs_and_compiles_before_the_first_step(tmp_path: Path) -> None:
    result = run(WITHOUT_COMPILER, CC=str(tmp_path / "no-such-compiler"), XDG_CACHE_HOME=str(tmp_path))
    assert result.stdout.startswith("1 numba No C compiler: set CC, or install gcc or clang.")
    assert result.stderr.count("WARNING") == 1 and "compiled by numba" in result.stderr


def test_an_environment_in_which_numba_cannot_compile_leaves_torch(tmp_path: Path) -> None:
    program = (
        "from offload.kernels import dispatch\n"
        "print(dispatch.available())\n"
        "with dispatch.use('numba'):\n"
        "    try: dispatch.implementation()\n"
        "    except RuntimeError as error: print(error)"
    )
    first, second = run(program, NUMBA_DISABLE_JIT="1", NUMBA_CACHE_DIR=str(tmp_path)).stdout.splitlines()
    assert first == "('native', 'reference')"
    assert second.startswith("The numba kernels were asked for but cannot run. numba 0")
    assert "cannot compile the kernels: TypingError" in second


def test_nowhere_to_cache_means_compiling_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from numba.core.caching import CompileResultCacheImpl

    monkeypatch.setattr(CompileResultCacheImpl, "_locator_classes", [])  # as when no directory is writable
    monkeypatch.setattr(library, "SIGNATURES", {name: SIGNATURES[name] for name in ("split", "join")})
    calls = Calls(library.load.__wrapped__())
    master = any_values(3001, torch.float32, 1, finite=True)
    param, low = torch.empty_like(master, dtype=torch.bfloat16), torch.empty_like(master, dtype=torch.int16)
    back = torch.empty_like(master)
    calls.split_(master, param, low)
    calls.join_(param, low, back)
    assert_same_bits(back, master)


def test_numba_that_cannot_be_imported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, package: str | None = None) -> None:
        raise ImportError("Numba needs an older NumPy")

    monkeypatch.setattr(library.importlib, "import_module", refuse)
    with pytest.raises(LibraryUnavailable, match="numba cannot be imported: Numba needs an older NumPy"):
        library.load.__wrapped__()
