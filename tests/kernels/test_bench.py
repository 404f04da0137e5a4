"""The kernel bench measures what it says: each implementation, the formula's bytes, bits equal to the reference."""

from __future__ import annotations

import dataclasses
import json

import torch

from offload.bench import kernels

from .bits import IMPLEMENTATIONS

COLUMNS = {
    "name",
    "implementation",
    "dtype_form",
    "elements",
    "threads",
    "bytes_per_element",
    "gb_per_s",
    "elements_per_s",
    "roof_gb_per_s",
    "of_roof",
    "cpu_s_per_1e9",
    "bits_equal_reference",
}
BYTES = {
    ("adamw", "split master, bf16 grad"): 26,
    ("adamw", "split master, fp32 grad"): 28,
    ("adamw", "fp32 master, fp32 grad"): 28,
    ("adamw", "fp32, then bf16 copy"): 34,
    ("sgd momentum", "split master, bf16 grad"): 18,
    ("adamw bf16 moments", "split master, bf16 grad"): 18,
    ("adamw 8-bit moments", "split master, bf16 grad"): 14.0625,
    ("squared norm", "bf16"): 2,
    ("squared norm", "fp32"): 4,
    ("accumulate", "fp32 += bf16"): 10,
    ("accumulate and norm", "fp32 += bf16"): 10,
    ("copy", "bf16 <- fp32"): 6,
}


def test_every_kernel_has_a_row_for_each_implementation() -> None:
    elements = 1 << 17
    rows = [
        row
        for case in kernels.cases(elements, with_compile=False)
        for row in kernels.measure_case(case, elements, threads=2, repetitions=1)
    ]
    assert {(row.name, row.dtype_form): row.bytes_per_element for row in rows} == BYTES
    for row in rows:
        fields = dataclasses.asdict(row)
        assert set(fields) == COLUMNS and json.loads(json.dumps(fields)) == fields
        assert abs(row.gb_per_s * 1e9 / (row.elements_per_s * row.bytes_per_element) - 1) < 1e-9
        assert row.roof_gb_per_s is not None and row.of_roof is not None
        assert abs(row.of_roof - row.gb_per_s / row.roof_gb_per_s) < 1e-9
        assert row.bits_equal_reference is (None if row.implementation == "torch fused" else True)
    implementations = {row.implementation for row in rows}
    assert implementations == {*IMPLEMENTATIONS, "torch fused"}
    assert len(kernels.table(rows).splitlines()) == len(rows) + 1
    (line,) = kernels.comparisons(rows)
    speed = {(row.name, row.dtype_form, row.implementation): row.elements_per_s for row in rows}
    ratio = speed["adamw", "split master, bf16 grad", "native"] / speed["adamw", "fp32, then bf16 copy", "torch fused"]
    assert f": {ratio:.2f} times the elements/s of torch fused (fp32, then bf16 copy)" in line


def test_a_difference_in_one_bit_is_seen() -> None:
    def call(flat: torch.Tensor) -> None:
        flat[0] = 1.0 if kernels.dispatch.implementation() == "native" else 1.0 + 2**-23

    case = kernels.Case(name="x", form="x", arrays={"flat": torch.zeros(200_000)}, streams=((4, 1),), call=call)
    assert not kernels.bits_equal(case)
