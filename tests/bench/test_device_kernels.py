"""The kernel bench of an accelerator: its arithmetic, on CPU tensors and with a timer that says what the test wants."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from offload.bench import device_kernels, kernels

CPU = torch.device("cpu")
ELEMENTS = 1 << 17


class Timer:
    """Runs what it is given; copies take `roof_s`, kernels 1.25 times as long, and the first of each twice that."""

    def __init__(self, roof_s: float) -> None:
        self.roof_s = roof_s
        self.copied_nbytes: list[int] = []
        self.calls = 0

    def __call__(self, function: Callable[[], Any]) -> tuple[float, float]:
        function()
        self.calls += 1
        slow = 2 if self.calls <= 2 else 1
        if isinstance(function, functools.partial):
            self.copied_nbytes.append(function.args[0].numel())
            return slow * self.roof_s, 0.1
        return slow * self.roof_s * 1.25, 0.5 * slow


@pytest.mark.parametrize("index", [0, 3], ids=["kernel", "peer"])
def test_a_row_holds_the_fastest_pass_beside_a_copy_of_as_many_bytes(index: int) -> None:
    case = list(kernels.cases(ELEMENTS, with_compile=False))[index]
    timer = Timer(0.5)
    (row,) = device_kernels.measure_case(case, ELEMENTS, CPU, 3, timer)
    nbytes = case.bytes_per_element * ELEMENTS
    assert timer.copied_nbytes == [nbytes / 2] * 3, "a copy reads and writes each of its bytes"
    assert timer.calls == 6
    assert row.roof_gb_per_s == pytest.approx(nbytes / 0.5 / 1e9)
    assert row.gb_per_s == pytest.approx(nbytes / 0.625 / 1e9)
    assert row.elements_per_s == pytest.approx(ELEMENTS / 0.625)
    assert row.of_roof == pytest.approx(0.8)
    assert row.cpu_s_per_1e9 == pytest.approx(0.5 / ELEMENTS * 1e9)
    peer = case.peer is not None
    assert (row.implementation, row.bits_equal_reference) == (("torch fused", None) if peer else ("triton", True))


def test_every_kernel_has_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    rows = device_kernels.run(CPU, quick=True, elements=ELEMENTS, timed=Timer(0.5))
    cases = list(kernels.cases(ELEMENTS, with_compile=False))
    assert [(row.name, row.dtype_form) for row in rows] == [(case.name, case.form) for case in cases]
    assert {row.elements for row in rows} == {ELEMENTS}
    assert "1.00 times the elements/s of torch fused" in capsys.readouterr().out


def test_losses_are_timed_and_weighed_the_same_way(capsys: pytest.CaptureFixture[str]) -> None:
    weighed: list[int] = []

    def peak(function: Callable[[], object]) -> int:
        function()
        weighed.append(3 << 20 if not weighed else 1 << 20)
        return weighed[-1]

    seconds = iter([4e-3, 2e-3, 1e-3, 3e-3])

    def timed(function: Callable[[], object]) -> tuple[float, float]:
        function()
        return next(seconds), 0.0

    theirs, ours = device_kernels.run_losses(CPU, True, timed, peak)
    assert (theirs.implementation, theirs.seconds, theirs.peak_nbytes) == ("torch", 2e-3, 3 << 20)
    assert (ours.implementation, ours.seconds, ours.peak_nbytes) == ("fused", 1e-3, 1 << 20)
    assert (ours.tokens, ours.width, ours.vocabulary) == (theirs.tokens, theirs.width, theirs.vocabulary)
    assert "fused: 1.00 ms, 1 MiB" in capsys.readouterr().out


def test_without_a_gpu_there_are_no_rows_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_kernels.find() is None
