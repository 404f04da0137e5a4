"""Triton kernels without a GPU: their bits in the interpreter, and what the compiler makes of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

HERE = Path(__file__).resolve().parent


def run_program(name: str, environment: dict[str, str]) -> str:
    result = subprocess.run(
        [sys.executable, "-P", str(HERE / name)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


@pytest.mark.parametrize("interpret", ["1", pytest.param("0", marks=pytest.mark.gpu)])
def test_interpreter_and_gpu_give_the_bits_of_the_native_kernels(interpret: str) -> None:
    output = run_program("triton_bits.py", {"TRITON_INTERPRET": interpret})
    counts = json.loads(output.splitlines()[-1])
    assert counts == {
        "check_optimizer": 144,
        "check_moments": 72,
        "check_gradient": 162,
        "check_projection": 72,
        "check_master": 6,
        "check_shapes": 27,
        "check_tuning": 1,
        "check_loss": 6,
    }


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    environment = {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "TRITON_INTERPRET": "0"}
    return [json.loads(line) for line in run_program("triton_compiled.py", environment).splitlines()]


def test_compiles_for_both_targets_without_spills(compiled: list[dict[str, object]]) -> None:
    shapes = ("1024 elements, 4 warps", "512 elements, 2 warps", "2048 elements, 8 warps", "2048 elements, 4 warps")
    assert {(entry["kernel"], entry["capability"], entry["shape"]) for entry in compiled} >= {
        (kernel, capability, shape)
        for kernel, used in (
            ("adamw split bf16", shapes),
            ("adam fp32", shapes),
            ("sgd split bf16", shapes),
            ("adamw bf16 moments", shapes),
            ("adamw 8-bit moments", ("own",)),
            ("projection sums", ("own",)),
        )
        for capability in (80, 90)
        for shape in used
    }
    for entry in compiled:
        assert entry["spill_stores_nbytes"] == entry["spill_loads_nbytes"] == 0, entry
        assert 0 < int(str(entry["registers"])) <= 168, entry  # 128 threads: three programs share a multiprocessor


def test_every_access_of_an_elementwise_kernel_is_16_bytes_wide(compiled: list[dict[str, object]]) -> None:
    narrow = {"accumulate and norm", "squared norm fp16", "projection sums", "adamw 8-bit moments"}
    for entry in compiled:
        widths = entry["access_nbytes"]
        assert isinstance(widths, dict)
        name = str(entry["kernel"])
        if name.startswith("cross entropy"):  # a label, its logit and the loss are single numbers
            assert widths["16"] >= 6
        elif name in narrow:  # one 8-byte sum per program; 1-byte codes come 8 to an access, scales one by one
            assert widths["16"] >= 4
        else:
            assert set(widths) == {"16"}, entry


def test_arithmetic_rounds_as_the_definition_does(compiled: list[dict[str, object]]) -> None:
    seen = 0
    for entry in compiled:
        if not str(entry["kernel"]).startswith("cross entropy"):
            assert entry["loose_arithmetic"] == [], entry
            seen += 1
        else:
            assert entry["loose_arithmetic"] != []  # exponentials: shows that the search finds what it looks for
    assert seen >= 88
