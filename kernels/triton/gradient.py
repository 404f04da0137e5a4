"""Gradient passes in Triton: sums in the order of `offload.kernels.gradient`, copies, accumulation, projection.

A program sums one block of 4096 elements as the tree that the definition states, in float64; the blocks' sums come to
the host and are added there in order, 2 bytes for each 1 KiB of gradient.
"""

# mypy: disable-error-code="no-untyped-def"
# Parameters of device functions are Triton values, which have no static types.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .formats import OPTIONS, as_float32, code, current_shape, from_float32, launches, load_master, parts

SUM_BLOCK = 4096


@triton.jit
def fold(products):
    """[1] of [4096] float64, in twelve folds. A sum of two numbers has one order, so `tl.sum` over two is defined."""
    products = tl.sum(tl.reshape(products, (2, 2048)), axis=0)
    products = tl.sum(tl.reshape(products, (2, 1024)), axis=0)
    products = tl.sum(tl.reshape(products, (2, 512)), axis=0)
    products = tl.sum(tl.reshape(products, (2, 256)), axis=0)
    products = tl.sum(tl.reshape(products, (2, 128)), axis=0)
    products = tl.sum(tl.reshape(products, (2, 64)), axis=0)
    products = tl.sum(tl.reshape(products, (2, 32)), axis=0)
    products = tl.sum(tl.reshape(products, (2, 16)), axis=0)
    products = tl.sum(tl.reshape(products, (2, 8)), axis=0)
    products = tl.sum(tl.reshape(products, (2, 4)), axis=0)
    products = tl.sum(tl.reshape(products, (2, 2)), axis=0)
    return tl.sum(products, axis=0)


@triton.jit
def gather_kernel(
    target,
    source,
    sums,
    n,
    TARGET: tl.constexpr,
    SOURCE: tl.constexpr,
    WRITES: tl.constexpr,
    ADDS: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """target = source, target += source, or neither; and the squares of what the target then holds."""
    program = tl.program_id(0)
    at = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    value = as_float32(tl.load(source + at, mask=mask, other=0), SOURCE)
    if ADDS:
        value = as_float32(tl.load(target + at, mask=mask, other=0), TARGET) + value
    if WRITES:
        stored = from_float32(value, TARGET)
        tl.store(target + at, stored, mask=mask)
        value = as_float32(stored, TARGET)
    if SUMS:
        wide = value.to(tl.float64)
        tl.store(sums + program, fold(wide * wide))


@triton.jit
def scale_kernel(flat, n, factor, CODE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    value = as_float32(tl.load(flat + at, mask=mask, other=0), CODE) * factor
    tl.store(flat + at, from_float32(value, CODE), mask=mask)


@triton.jit
def projection_sums_kernel(param, low, grad, sums, n, IS_SPLIT: tl.constexpr, GRAD: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    at = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    w = load_master(param, low, at, mask, IS_SPLIT).to(tl.float64)
    g = as_float32(tl.load(grad + at, mask=mask, other=0), GRAD).to(tl.float64)
    tl.store(sums + program * 3, fold(w * g))
    tl.store(sums + program * 3 + 1, fold(w * w))
    tl.store(sums + program * 3 + 2, fold(g * g))


@triton.jit
def project_kernel(
    param, low, grad, n, coefficient, rescale, IS_SPLIT: tl.constexpr, GRAD: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    w = load_master(param, low, at, mask, IS_SPLIT)
    g = as_float32(tl.load(grad + at, mask=mask, other=0), GRAD)
    tl.store(grad + at, from_float32((g - w * coefficient) * rescale, GRAD), mask=mask)


def squared_norm(flat: Tensor) -> float:
    return _gather(flat, flat, writes=False, adds=False, sums=True)


def copy_(dst: Tensor, src: Tensor) -> None:
    _gather(dst, src, writes=True, adds=False, sums=False)


def accumulate_(acc: Tensor, grad: Tensor) -> None:
    _gather(acc, grad, writes=True, adds=True, sums=False)


def copy_squared_norm_(dst: Tensor, src: Tensor) -> float:
    return _gather(dst, src, writes=True, adds=False, sums=True)


def accumulate_squared_norm_(acc: Tensor, grad: Tensor) -> float:
    return _gather(acc, grad, writes=True, adds=True, sums=True)


def scale_(flat: Tensor, factor: float) -> None:
    shape = current_shape()
    for first, count, programs in launches(flat.numel(), shape.block):
        scale_kernel[(programs,)](*parts(first, flat), count, factor, CODE=code(flat), **shape.options)


def projection_sums(param: Tensor, low: Tensor | None, grad: Tensor) -> tuple[float, float, float]:
    n = grad.numel()
    sums = torch.zeros(triton.cdiv(n, SUM_BLOCK), 3, dtype=torch.float64, device=grad.device)
    for first, count, programs in launches(n - n % SUM_BLOCK, SUM_BLOCK) + _rest(n):
        tensors = parts(first, param, low, grad)
        projection_sums_kernel[(programs,)](
            *tensors,
            sums[first // SUM_BLOCK :],
            count,
            IS_SPLIT=low is not None,
            GRAD=code(grad),
            BLOCK=SUM_BLOCK,
            **OPTIONS,
        )
    weight_grad, weight_weight, grad_grad = (_add_in_order(column) for column in sums.unbind(1))
    return weight_grad, weight_weight, grad_grad


def project_(param: Tensor, low: Tensor | None, grad: Tensor, coefficient: float, rescale: float) -> None:
    shape = current_shape()
    for first, count, programs in launches(grad.numel(), shape.block):
        tensors = parts(first, param, low, grad)
        project_kernel[(programs,)](
            *tensors, count, coefficient, rescale, IS_SPLIT=low is not None, GRAD=code(grad), **shape.options
        )


def _gather(target: Tensor, source: Tensor, *, writes: bool, adds: bool, sums: bool) -> float:
    n, shape = source.numel(), current_shape()
    partial = torch.zeros(triton.cdiv(n, SUM_BLOCK) if sums else 1, dtype=torch.float64, device=source.device)
    options = OPTIONS | {"BLOCK": SUM_BLOCK} if sums else shape.options
    spans = launches(n - n % SUM_BLOCK, SUM_BLOCK) + _rest(n) if sums else launches(n, shape.block)
    for first, count, programs in spans:
        gather_kernel[(programs,)](
            *parts(first, target, source),
            partial[first // SUM_BLOCK :] if sums else partial,
            count,
            TARGET=code(target),
            SOURCE=code(source),
            WRITES=writes,
            ADDS=adds,
            SUMS=sums,
            **options,
        )
    return _add_in_order(partial) if sums else 0.0


def _rest(n: int) -> list[tuple[int, int, int]]:
    """The launch for the last, short block of sums."""
    return [(n - n % SUM_BLOCK, n % SUM_BLOCK, 1)] if n % SUM_BLOCK else []


def _add_in_order(sums: Tensor) -> float:
    total = 0.0
    for value in sums.tolist():  # not sum(): since Python 3.12 it compensates the rounding
        total += value
    return total
