"""Speed of the kernels on an accelerator: one row per kernel beside a device-to-device copy, and losses beside torch's.

The rows are those of `kernels`; the arrays lie on the device and one call takes them whole. The roof of a row is a copy
that reads and writes, together, as many bytes as the kernel, in turns with it.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from offload.kernels import dispatch
from offload.kernels.loss import linear_cross_entropy

from . import kernels
from .kernels import TRITON, Case, Row, Timed
from .memory import format_nbytes

Peak = Callable[[Callable[[], object]], int]
ELEMENTS, QUICK_ELEMENTS = 1 << 28, 1 << 22


@dataclass(frozen=True, kw_only=True)
class LossRow:
    """Forward and backward of a linear layer and its loss, bf16, on hidden states [tokens, width].

    `peak_nbytes` is what they take of the device at their most, gradients included, beyond what was there before.
    """

    name: str
    implementation: str
    tokens: int
    width: int
    vocabulary: int
    seconds: float
    peak_nbytes: int


def find() -> torch.device | None:
    """The GPU on which Triton kernels run here, or None."""
    if not torch.cuda.is_available():
        return None
    device = torch.device("cuda", torch.cuda.current_device())
    return device if dispatch.uses_triton(device) else None


def describe(device: torch.device) -> str:
    found = torch.cuda.get_device_properties(device)
    return f"{found.name}, {format_nbytes(found.total_memory)}"


def run(device: torch.device, quick: bool, elements: int | None = None, timed: Timed | None = None) -> list[Row]:
    """Measure every kernel on `device`; print the rows as a table and return them.

    Args:
        quick: small arrays, few repetitions, no torch.compile: a smoke test.
        elements: of every array; the largest case needs 56 bytes of the device for each, its roof included.
        timed: by default with the device's events.
    """
    dispatch.tune_once(device)
    elements = elements or (QUICK_ELEMENTS if quick else ELEMENTS)
    timed = timed or functools.partial(_timed, device)
    cases = iter(kernels.cases(elements, with_compile=not quick))
    rows: list[Row] = []
    while True:
        with torch.device(device):  # where the case's arrays are made
            case = next(cases, None)
        if case is None:
            break
        rows += measure_case(case, elements, device, 3 if quick else 20, timed)
        del case  # its arrays go before the next one's come
    print(kernels.table(rows))
    for line in kernels.comparisons(rows):
        print(line)
    return rows


def measure_case(case: Case, elements: int, device: torch.device, repetitions: int, timed: Timed) -> list[Row]:
    """The row of one case. `timed` gives wall seconds on the device, and CPU seconds."""
    half = round(case.bytes_per_element * elements / 2)
    source, target = (torch.zeros(half, dtype=torch.uint8, device=device) for _ in range(2))
    implementation = case.peer or TRITON

    def one_pass() -> None:
        with dispatch.use("auto"):
            case.call(**case.arrays)

    roof = functools.partial(target.copy_, source)
    return kernels.take_turns(case, elements, 0, {implementation: one_pass}, roof, repetitions, timed)


def run_losses(
    device: torch.device, quick: bool, timed: Timed | None = None, peak: Peak | None = None
) -> list[LossRow]:
    """Measure fused linear + cross-entropy and torch's own; print a line for each and return the rows.

    Args:
        timed: by default with the device's events.
        peak: runs a function and gives the bytes that it took at its most; by default from torch's allocator.
    """
    tokens, width, vocabulary = (512, 64, 1000) if quick else (16384, 4096, 128256)
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(tokens, width, device=device, generator=generator).bfloat16().requires_grad_()
    weight = (torch.randn(vocabulary, width, device=device, generator=generator) * 0.02).bfloat16().requires_grad_()
    target = torch.randint(vocabulary, (tokens,), device=device, generator=generator)

    def torchs() -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), target)

    def fused() -> Tensor:
        return linear_cross_entropy(hidden, weight, target)

    timed = timed or functools.partial(_timed, device)
    peak = peak or functools.partial(_peak, device)
    rows = []
    for name, loss in (("torch", torchs), ("fused", fused)):

        def both(loss: Callable[[], Tensor] = loss) -> None:
            torch.autograd.grad(loss(), [hidden, weight])

        both()  # compiles
        rows.append(
            LossRow(
                name="linear + cross-entropy",
                implementation=name,
                tokens=tokens,
                width=width,
                vocabulary=vocabulary,
                seconds=min(timed(both)[0] for _ in range(2 if quick else 10)),
                peak_nbytes=peak(both),
            )
        )
    for row in rows:
        print(
            f"{row.name}, {row.implementation}: {row.seconds * 1e3:.2f} ms, {format_nbytes(row.peak_nbytes)} "
            f"({tokens} tokens, width {width}, vocabulary {vocabulary})"
        )
    return rows


def _timed(device: torch.device, function: Callable[[], object]) -> tuple[float, float]:
    """Seconds between the device's events before and behind what `function` gives it, and CPU seconds."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    cpu_s = time.process_time()
    start.record(torch.cuda.current_stream(device))
    function()
    end.record(torch.cuda.current_stream(device))
    end.synchronize()
    return start.elapsed_time(end) / 1e3, time.process_time() - cpu_s


def _peak(device: torch.device, function: Callable[[], object]) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before_nbytes = torch.cuda.memory_allocated(device)
    function()
    return int(torch.cuda.max_memory_allocated(device) - before_nbytes)
