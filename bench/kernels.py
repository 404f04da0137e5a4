"""Speed of the kernels beside what the memory gives: one row per (kernel, implementation). What an
accelerator does with them is `device_kernels`.

The roof of a row is measured in the same run, with the same threads, the same chunks and the same streams: a pass
that reads, writes or updates in place arrays of the same widths, on the same kind of pages, and does next to no
arithmetic. Kernel and roof take turns, and both count with their best repetition, because what else runs on the
machine can only slow them. Ranges are cut before the clock starts, so a row holds the kernel and one public call for
each chunk, and nothing of the bench's own.

Peers, untuned: torch's fused AdamW over fp32 parameters followed by a bf16 copy of them, which is what a split master
replaces, and torch.compile of the split-master formula.
"""

from __future__ import annotations

import functools
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from offload.kernels import dispatch, gradient, master, moments, optimizer
from offload.kernels.native import library
from offload.kernels.rounding import Rounding

CHUNK_ALIGN = 4096  # elements: whole blocks of every kernel, whole pages of every array
CHUNKS_PER_THREAD = 8  # a thread that is held up leaves its later ones to the others
READ, UPDATE, WRITE = 0, 1, 2
ADAMW = optimizer.AdamScalars(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, step=3, decoupled=True)
SGD = optimizer.SgdScalars(lr=1e-3, momentum=0.9, dampening=0.0, weight_decay=0.1, nesterov=False, first=False)
Timed = Callable[[Callable[[], object]], tuple[float, float]]
TRITON = "triton"  # what "auto" takes for tensors of a GPU
SPLIT_ADAMW = ("adamw", "split master, bf16 grad")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement. GB = 1e9 bytes; CPU seconds count all threads of the process."""

    name: str
    implementation: str
    dtype_form: str
    elements: int
    threads: int
    bytes_per_element: float
    gb_per_s: float
    elements_per_s: float
    roof_gb_per_s: float | None
    of_roof: float | None
    cpu_s_per_1e9: float
    bits_equal_reference: bool | None  # None: a peer, which computes something else


@dataclass(frozen=True, kw_only=True)
class Case:
    """A kernel over whole arrays: `call` works on one range of all `arrays`."""

    name: str
    form: str
    arrays: dict[str, Tensor]
    streams: tuple[tuple[int, int], ...]  # (bytes per element, READ | UPDATE | WRITE)
    call: Callable[..., object]
    peer: str | None = None  # then `call` takes the whole arrays and uses torch's own threads

    @property
    def bytes_per_element(self) -> float:
        """Bytes read and written; a scale is 4 bytes for each block of 256 elements, updated in place."""
        scales = sum(name.endswith("_scale") for name in self.arrays) * 2 * 4 / moments.QUANT_BLOCK
        return sum(size * (2 if mode == UPDATE else 1) for size, mode in self.streams) + scales


def run(quick: bool, threads: int | None = None) -> list[Row]:
    """Measure every kernel on this machine; print the rows as a table and return them.

    Args:
        quick: arrays that partly fit in caches, few repetitions, no torch.compile: a smoke test, not a measurement.
        threads: executor threads and torch threads; by default as many as torch uses.
    """
    threads = threads or torch.get_num_threads()
    elements = 1 << 22 if quick else 1 << 26
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    with_compile = not quick and shutil.which(os.environ.get("CXX") or "g++") is not None
    rows = []
    try:
        for case in cases(elements, with_compile=with_compile):
            rows += measure_case(case, elements, threads, repetitions=3 if quick else 15)
    finally:
        torch.set_num_threads(before)
    print(table(rows))
    for line in comparisons(rows):
        print(line)
    if not quick and not with_compile:
        print("torch.compile is left out: it needs a C++ compiler, and there is none. Install g++ or set CXX.")
    return rows


def cases(n: int, *, with_compile: bool) -> Iterable[Case]:
    """The kernels with their arrays of `n` elements; arrays are made one case at a time."""
    yield _adam(n, is_split=True, grad=torch.bfloat16)
    yield _adam(n, is_split=True, grad=torch.float32)
    yield _adam(n, is_split=False, grad=torch.float32)
    yield _fused_adamw(n)
    if with_compile:
        yield _compiled_adamw(n)
    yield _sgd(n)
    yield _adam_bf16(n)
    yield _adam_8bit(n)
    yield from _gradient_cases(n)


def measure_case(case: Case, elements: int, threads: int, repetitions: int) -> list[Row]:
    """The rows of one case: the peer itself, or each implementation that runs here; all take turns with the roof."""
    with ThreadPoolExecutor(threads) as executor:
        chunk = -(-elements // (CHUNKS_PER_THREAD * threads * CHUNK_ALIGN)) * CHUNK_ALIGN
        spans = [(start, min(chunk, elements - start)) for start in range(0, elements, chunk)]
        share = functools.partial(_share, executor, threads)
        passes = _passes(case, spans, share)
        return take_turns(case, elements, threads, passes, _roof_pass(case, elements, spans, share), repetitions, timed)


def take_turns(
    case: Case,
    elements: int,
    threads: int,
    passes: Mapping[str, Callable[[], object]],
    roof_pass: Callable[[], object] | None,
    repetitions: int,
    timed: Timed,
) -> list[Row]:
    """A row for each of `passes` (by implementation) over all elements, timed in turns with the pass that is the roof.

    Args:
        timed: runs a pass to its end and gives its wall seconds and CPU seconds.
    """
    best = {name: (float("inf"), float("inf")) for name in passes}
    best_roof_s = float("inf")
    for one_pass in passes.values():
        one_pass()  # touches every page, fills scratch memory, compiles what a peer compiles
    for repetition in range(repetitions):
        if roof_pass is not None:
            best_roof_s = min(best_roof_s, timed(roof_pass)[0])
        for name, one_pass in passes.items():
            if name == "reference" and repetition % 5:
                continue  # slow
            wall_s, cpu_s = timed(one_pass)
            best[name] = min(best[name][0], wall_s), min(best[name][1], cpu_s)
    return [
        Row(
            name=case.name,
            implementation=name,
            dtype_form=case.form,
            elements=elements,
            threads=threads,
            bytes_per_element=case.bytes_per_element,
            gb_per_s=elements / wall_s * case.bytes_per_element / 1e9,
            elements_per_s=elements / wall_s,
            roof_gb_per_s=None if roof_pass is None else case.bytes_per_element * elements / best_roof_s / 1e9,
            of_roof=None if roof_pass is None else best_roof_s / wall_s,
            cpu_s_per_1e9=cpu_s / elements * 1e9,
            bits_equal_reference=None if case.peer is not None else name == "reference" or bits_equal(case, name),
        )
        for name, (wall_s, cpu_s) in best.items()
    ]


def bits_equal(case: Case, name: str = "native") -> bool:
    """Whether implementation `name` leaves the same bits in every array, after one call on an odd range, as the
    reference on the CPU."""
    mine = {key: value.clone() for key, value in _part(case.arrays, 0, 100_003).items()}
    definition = {key: value.clone().cpu() for key, value in mine.items()}
    with dispatch.use("auto" if name == TRITON else name):
        value = case.call(**mine)
    with dispatch.use("reference"):
        expected = case.call(**definition)
    return value == expected and all(
        torch.equal(mine[key].cpu().view(torch.uint8), definition[key].view(torch.uint8)) for key in mine
    )


def table(rows: list[Row]) -> str:
    """The rows as aligned text."""
    lines = [
        f"{'kernel':<24}{'form':<26}{'implementation':<16}{'B/el':>6}{'GB/s':>8}{'Gel/s':>8}{'roof':>7}{'of roof':>9}"
        f"{'cpu s/1e9':>11}  same bits"
    ]
    for row in rows:
        roof = f"{row.roof_gb_per_s:7.1f}" if row.roof_gb_per_s is not None else f"{'-':>7}"
        share = f"{row.of_roof:9.0%}" if row.of_roof is not None else f"{'-':>9}"
        bits = {True: "yes", False: "NO", None: "-"}[row.bits_equal_reference]
        lines.append(
            f"{row.name:<24}{row.dtype_form:<26}{row.implementation:<16}{row.bytes_per_element:6.1f}"
            f"{row.gb_per_s:8.1f}{row.elements_per_s / 1e9:8.2f}{roof}{share}{row.cpu_s_per_1e9:11.2f}  {bits}"
        )
    return "\n".join(lines)


def comparisons(rows: list[Row]) -> list[str]:
    """What the split master is for: elements per second of AdamW, as the rows have it, against each peer among them."""
    ours = [
        row for row in rows if (row.name, row.dtype_form) == SPLIT_ADAMW and row.implementation in ("native", TRITON)
    ]
    peers = [row for row in rows if row.bits_equal_reference is None]
    return [
        f"{row.name}, {row.dtype_form}: {row.elements_per_s / peer.elements_per_s:.2f} times the elements/s of "
        f"{peer.implementation} ({peer.dtype_form})"
        for row in ours
        for peer in peers
    ]


def _share(executor: ThreadPoolExecutor, threads: int, work: Callable[[Any], object], items: list[Any]) -> None:
    """Do `work` on every item: each thread takes the next one until none is left."""
    rest = iter(items)  # of a list: taking the next item is one step for all threads

    def take() -> None:
        for item in rest:
            work(item)

    for future in [executor.submit(take) for _ in range(threads)]:
        future.result()


def _passes(case: Case, spans: list[tuple[int, int]], share: Callable[..., None]) -> dict[str, Callable[[], object]]:
    """Implementation -> one pass over all elements, cut into spans (first element, number of elements)."""
    if case.peer is not None:
        return {case.peer: lambda: case.call(**case.arrays)}
    parts = [_part(case.arrays, start, count) for start, count in spans]

    def one_pass(name: str) -> None:
        with dispatch.use(name):
            share(lambda part: case.call(**part), parts)

    return {name: functools.partial(one_pass, name) for name in dispatch.available()}


def _roof_pass(
    case: Case, elements: int, spans: list[tuple[int, int]], share: Callable[..., None]
) -> Callable[[], object] | None:
    """A pass over arrays of the case's widths with next to no arithmetic; None without the native library."""
    if "native" not in dispatch.available():
        return None
    native = library.load()
    arrays = [torch.zeros(elements * size, dtype=torch.uint8) for size, _ in case.streams]

    def part(start: int, count: int) -> tuple[int, int, Any]:
        structs = (library.StreamStruct * len(arrays))()
        for struct, array, (size, mode) in zip(structs, arrays, case.streams, strict=True):
            struct.data, struct.size_nbytes, struct.mode = array.data_ptr() + start * size, size, mode
        return count, len(arrays), structs

    parts = [part(start, count) for start, count in spans]

    def one_pass(arrays: list[Tensor] = arrays) -> None:  # the parts hold addresses: the arrays must live as long
        share(lambda part: native.offl_stream(*part), parts)

    return one_pass


def timed(function: Callable[[], object]) -> tuple[float, float]:
    """Wall seconds and CPU seconds of all threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - cpu


def _part(arrays: dict[str, Tensor], start: int, count: int) -> dict[str, Tensor]:
    """The arrays' elements from `start` on; arrays named *_scale hold one number for each 256 elements."""
    return {
        name: array[_scales(start, count)] if name.endswith("_scale") else array[start : start + count]
        for name, array in arrays.items()
    }


def _scales(start: int, count: int) -> slice:
    return slice(start // moments.QUANT_BLOCK, moments.num_scales(start + count))


def _master(n: int, *, is_split: bool) -> dict[str, Tensor]:
    values = torch.randn(n) * 0.02
    if not is_split:
        return {"param": values}
    param, low = torch.empty(n, dtype=torch.bfloat16), torch.empty(n, dtype=torch.int16)
    master.split_(values, param, low)
    return {"param": param, "low": low}


def _master_streams(is_split: bool) -> tuple[tuple[int, int], ...]:
    return ((2, UPDATE), (2, UPDATE)) if is_split else ((4, UPDATE),)


def _name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def _adam(n: int, *, is_split: bool, grad: torch.dtype) -> Case:
    return Case(
        name="adamw",
        form=f"{'split' if is_split else 'fp32'} master, {_name(grad)} grad",
        arrays=_master(n, is_split=is_split)
        | {
            "exp_avg": torch.randn(n) * 0.01,
            "exp_avg_sq": torch.rand(n) * 1e-4,
            "grad": (torch.randn(n) * 0.01).to(grad),
        },
        streams=(*_master_streams(is_split), (4, UPDATE), (4, UPDATE), (grad.itemsize, READ)),
        call=lambda param, exp_avg, exp_avg_sq, grad, low=None: optimizer.adam_(
            param, low, exp_avg, exp_avg_sq, grad, ADAMW, 0.5
        ),
    )


def _sgd(n: int) -> Case:
    return Case(
        name="sgd momentum",
        form="split master, bf16 grad",
        arrays=_master(n, is_split=True)
        | {"buffer": torch.randn(n) * 0.01, "grad": (torch.randn(n) * 0.01).bfloat16()},
        streams=(*_master_streams(True), (4, UPDATE), (2, READ)),
        call=lambda param, low, buffer, grad: optimizer.sgd_(param, low, buffer, grad, SGD, 0.5),
    )


def _adam_bf16(n: int) -> Case:
    return Case(
        name="adamw bf16 moments",
        form="split master, bf16 grad",
        arrays=_master(n, is_split=True)
        | {
            "exp_avg": (torch.randn(n) * 0.01).bfloat16(),
            "exp_avg_sq": (torch.rand(n) * 1e-4).bfloat16(),
            "grad": (torch.randn(n) * 0.01).bfloat16(),
        },
        streams=(*_master_streams(True), (2, UPDATE), (2, UPDATE), (2, READ)),
        call=lambda param, low, exp_avg, exp_avg_sq, grad: moments.adam_bf16_(
            param, low, exp_avg, exp_avg_sq, grad, ADAMW, Rounding(seed=0, step=3, first_index=0), 0.5
        ),
    )


def _adam_8bit(n: int) -> Case:
    scales = moments.num_scales(n)
    return Case(
        name="adamw 8-bit moments",
        form="split master, bf16 grad",
        arrays=_master(n, is_split=True)
        | {
            "exp_avg": torch.randint(-127, 128, (n,), dtype=torch.int8),
            "exp_avg_scale": torch.full((scales,), 0.01),
            "exp_avg_sq": torch.randint(1, 256, (n,), dtype=torch.uint8),
            "exp_avg_sq_scale": torch.full((scales,), 1e-4),
            "grad": (torch.randn(n) * 0.01).bfloat16(),
        },
        streams=(*_master_streams(True), (1, UPDATE), (1, UPDATE), (2, READ)),
        call=lambda param, low, exp_avg, exp_avg_scale, exp_avg_sq, exp_avg_sq_scale, grad: moments.adam_8bit_(
            param, low, exp_avg, exp_avg_scale, exp_avg_sq, exp_avg_sq_scale, grad, ADAMW, 0.5
        ),
    )


def _gradient_cases(n: int) -> Iterable[Case]:
    narrow, wide = (torch.randn(n) * 0.01).bfloat16(), torch.randn(n) * 0.01
    yield Case(
        name="squared norm", form="bf16", arrays={"flat": narrow}, streams=((2, READ),), call=gradient.squared_norm
    )
    yield Case(
        name="squared norm", form="fp32", arrays={"flat": wide}, streams=((4, READ),), call=gradient.squared_norm
    )
    yield Case(
        name="accumulate",
        form="fp32 += bf16",
        arrays={"acc": wide, "grad": narrow},
        streams=((4, UPDATE), (2, READ)),
        call=gradient.accumulate_,
    )
    yield Case(
        name="accumulate and norm",
        form="fp32 += bf16",
        arrays={"acc": wide, "grad": narrow},
        streams=((4, UPDATE), (2, READ)),
        call=gradient.accumulate_squared_norm_,
    )
    yield Case(
        name="copy",
        form="bf16 <- fp32",
        arrays={"dst": narrow, "src": wide},
        streams=((2, WRITE), (4, READ)),
        call=gradient.copy_,
    )


def _fused_adamw(n: int) -> Case:
    param = torch.nn.Parameter(torch.randn(n) * 0.02)
    param.grad = torch.randn(n) * 0.01
    optim = torch.optim.AdamW([param], lr=1e-3, weight_decay=0.1, fused=True)

    def call(half: Tensor) -> None:
        optim.step()
        half.copy_(param.detach())

    return Case(
        name="adamw",
        form="fp32, then bf16 copy",
        arrays={"half": torch.empty(n, dtype=torch.bfloat16)},
        streams=((4, UPDATE), (4, UPDATE), (4, UPDATE), (4, READ), (4, READ), (2, WRITE)),
        call=call,
        peer="torch fused",
    )


def _compiled_adamw(n: int) -> Case:
    case = _adam(n, is_split=True, grad=torch.bfloat16)
    bias1, bias2 = 1 - ADAMW.beta1**ADAMW.step, 1 - ADAMW.beta2**ADAMW.step

    @torch.compile
    def step(param: Tensor, low: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor) -> None:
        bits = (param.view(torch.int16).to(torch.int32) << 16) + low.to(torch.int32)
        p, g = bits.view(torch.float32), grad.float() * 0.5
        m = exp_avg + (g - exp_avg) * (1 - ADAMW.beta1)
        v = exp_avg_sq * ADAMW.beta2 + (g * g) * (1 - ADAMW.beta2)
        update = (ADAMW.lr * bias2**0.5 / bias1) * (m / (v.sqrt() + ADAMW.eps * bias2**0.5))
        p = p - (update + p * (ADAMW.lr * ADAMW.weight_decay))
        bits = torch.where(torch.isnan(p), 0x7FC00000, p.view(torch.int32))
        exp_avg.copy_(m)
        exp_avg_sq.copy_(v)
        low.copy_(bits.to(torch.int16))
        param.view(torch.int16).copy_(((bits + 0x8000) >> 16).to(torch.int16))

    return Case(
        name=case.name, form=case.form, arrays=case.arrays, streams=case.streams, call=step, peer="torch.compile"
    )
