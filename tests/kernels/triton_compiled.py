"""Compiles Triton kernels ahead of time for a GPU that need not be here, and reads what came out.

Run as a program in a process of its own, without TRITON_INTERPRET: prints one JSON object per (kernel, shape, target).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from offload.kernels.triton import formats, gradient, loss, master, moments, optimizer

ADAM = "fp32 " * 8
POINTERS = {"f": "*fp32", "s": "*i16", "h": "*fp16", "b": "*i8", "u": "*u8", "d": "*fp64", "l": "*i64"}

# name -> (kernel, one letter per pointer, scalar types, constants)
KERNELS: dict[str, tuple[Any, str, str, dict[str, Any]]] = {
    "adamw split bf16": (
        optimizer.adam_kernel,
        "ssffs",
        "i32 " + ADAM,
        {"IS_SPLIT": True, "GRAD": 1, "HAS_DECAY": True, "HAS_L2": False},
    ),
    "adam fp32": (
        optimizer.adam_kernel,
        "f-fff",
        "i32 " + ADAM,
        {"IS_SPLIT": False, "GRAD": 0, "HAS_DECAY": False, "HAS_L2": True},
    ),
    "adamw split fp16": (
        optimizer.adam_kernel,
        "ssffh",
        "i32 " + ADAM,
        {"IS_SPLIT": True, "GRAD": 2, "HAS_DECAY": True, "HAS_L2": False},
    ),
    "sgd split bf16": (
        optimizer.sgd_kernel,
        "ssfs",
        "i32 " + "fp32 " * 5,
        {
            "IS_SPLIT": True,
            "GRAD": 1,
            "HAS_BUFFER": True,
            "HAS_L2": True,
            "NESTEROV": True,
            "FIRST": False,
        },
    ),
    "adamw bf16 moments": (
        moments.adam_bf16_kernel,
        "sssss",
        "i32 i32 i32 i64 " + ADAM,
        {"IS_SPLIT": True, "GRAD": 1, "HAS_DECAY": True, "HAS_L2": False},
    ),
    "adamw 8-bit moments": (
        moments.adam_8bit_kernel,
        "ssbfufs",
        "i32 " + ADAM,
        {"IS_SPLIT": True, "GRAD": 1, "HAS_DECAY": True, "HAS_L2": False, "ROWS": moments.ROWS, "QUANT_BLOCK": 256},
    ),
    "copy bf16 <- fp32": (
        gradient.gather_kernel,
        "sfd",
        "i32",
        {"TARGET": 1, "SOURCE": 0, "WRITES": True, "ADDS": False, "SUMS": False},
    ),
    "accumulate and norm": (
        gradient.gather_kernel,
        "fsd",
        "i32",
        {"TARGET": 0, "SOURCE": 1, "WRITES": True, "ADDS": True, "SUMS": True, "BLOCK": gradient.SUM_BLOCK},
    ),
    "squared norm fp16": (
        gradient.gather_kernel,
        "hhd",
        "i32",
        {"TARGET": 2, "SOURCE": 2, "WRITES": False, "ADDS": False, "SUMS": True, "BLOCK": gradient.SUM_BLOCK},
    ),
    "scale fp16": (gradient.scale_kernel, "h", "i32 fp32", {"CODE": 2}),
    "projection sums": (
        gradient.projection_sums_kernel,
        "sssd",
        "i32",
        {"IS_SPLIT": True, "GRAD": 1, "BLOCK": gradient.SUM_BLOCK},
    ),
    "project": (
        gradient.project_kernel,
        "sss",
        "i32 fp32 fp32",
        {"IS_SPLIT": True, "GRAD": 1},
    ),
    "split": (master.split_kernel, "fss", "i32", {}),
    "join": (master.join_kernel, "fss", "i32", {}),
    "cross entropy bf16": (
        loss.cross_entropy_kernel,
        "slf",
        "i32 i32 i64 fp32",
        {"CODE": 1, "GRADIENT": True, "NUM_BLOCKS": 13, "BLOCK": loss.BLOCK},
    ),
    "cross entropy fp32": (
        loss.cross_entropy_kernel,
        "flf",
        "i32 i32 i64 fp32",
        {"CODE": 0, "GRADIENT": True, "NUM_BLOCKS": 13, "BLOCK": loss.BLOCK},
    ),
}


def shapes_of(name: str) -> tuple[formats.Shape | None, ...]:
    """The shapes that an element-wise kernel may be launched with; None for a kernel that sets its own."""
    function, _, _, constants = KERNELS[name]
    return formats.SHAPES if "BLOCK" in function.arg_names and "BLOCK" not in constants else (None,)


def compile_kernel(name: str, capability: int, shape: formats.Shape | None) -> dict[str, object]:
    """Registers, spills and the memory and arithmetic instructions of one kernel on one target."""
    function, pointers, scalars, constants = KERNELS[name]
    options = loss.OPTIONS if function is loss.cross_entropy_kernel else formats.OPTIONS
    if shape is not None:
        options = shape.options
        constants = constants | {"BLOCK": options.pop("BLOCK")}
    types = [POINTERS.get(letter, "constexpr") for letter in pointers] + scalars.split()
    names = function.arg_names
    signature = dict(zip(names, types, strict=False)) | dict.fromkeys(constants, "constexpr")
    constants = constants | {names[i]: None for i, letter in enumerate(pointers) if letter == "-"}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, kind in enumerate(signature.values())
        if kind.startswith("*") or (kind == "i32" and names[i] in ("n", "stride", "vocabulary"))
    }
    source = ASTSource(function, signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = compiled.asm["ptx"]
    shape_name = "own" if shape is None else f"{shape.block} elements, {shape.num_warps} warps"
    head = {"kernel": name, "capability": capability, "shape": shape_name}
    return {**head, **_resources(ptx, capability), **_instructions(ptx)}


def _resources(ptx: str, capability: int) -> dict[str, int]:
    assembler = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    target = f"sm_{capability}a" if capability == 90 else f"sm_{capability}"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        words = subprocess.run(
            [str(assembler), "-v", f"--gpu-name={target}", str(source), "-o", str(Path(folder) / "kernel.cubin")],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
    found = {
        key: re.search(pattern, words)
        for key, pattern in (
            ("registers", r"Used (\d+) registers"),
            ("spill_stores_nbytes", r"(\d+) bytes spill stores"),
            ("spill_loads_nbytes", r"(\d+) bytes spill loads"),
        )
    }
    return {key: int(match.group(1)) for key, match in found.items() if match is not None}


def _instructions(ptx: str) -> dict[str, object]:
    """Widths in bytes of all global loads and stores, and the arithmetic that would round differently."""
    widths: Counter[int] = Counter()
    for vector, bits in re.findall(r"(?:ld|st)\.global[.\w:]*?(?:\.v(\d))?\.[busf](\d+)", ptx):
        widths[int(vector or 1) * int(bits) // 8] += 1
    loose = re.findall(r"\b(?:fma\.rn(?:\.ftz)?\.f32|\w+\.approx[.\w]*|div\.full[.\w]*|\w+\.\w*\.?ftz\.f32)\b", ptx)
    return {"access_nbytes": dict(widths), "loose_arithmetic": sorted(set(loose))}


if __name__ == "__main__":
    for kernel_name in KERNELS:
        for kernel_shape in shapes_of(kernel_name):
            for target_capability in (80, 90):
                print(json.dumps(compile_kernel(kernel_name, target_capability, kernel_shape)), flush=True)
    sys.exit(0)
