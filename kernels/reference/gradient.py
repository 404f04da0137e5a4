"""Passes over gradients in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from .blocks import blocks, one_pass, scratch
from .master import load_master

SUM_BLOCK = 4096


@one_pass
def squared_norm(flat: Tensor) -> float:
    total = 0.0
    for (block,) in blocks(flat):
        total = _add_in_order(total, _block_dots(block, block))
    return total


@one_pass
def accumulate_(acc: Tensor, grad: Tensor) -> None:
    for acc_b, grad_b in blocks(acc, grad):
        acc_b.copy_(_as_float32(acc_b, "g").add_(_as_float32(grad_b, "t")))


@one_pass
def copy_(dst: Tensor, src: Tensor) -> None:
    for dst_b, src_b in blocks(dst, src):
        dst_b.copy_(_as_float32(src_b, "t"))


def copy_squared_norm_(dst: Tensor, src: Tensor) -> float:
    copy_(dst, src)
    return squared_norm(dst)


def accumulate_squared_norm_(acc: Tensor, grad: Tensor) -> float:
    accumulate_(acc, grad)
    return squared_norm(acc)


@one_pass
def scale_(flat: Tensor, factor: float) -> None:
    for (block,) in blocks(flat):
        block.copy_(torch.mul(_as_float32(block, "t"), factor, out=scratch("t", block)))


@one_pass
def projection_sums(param: Tensor, low: Tensor | None, grad: Tensor) -> tuple[float, float, float]:
    weight_grad = weight_weight = grad_grad = 0.0
    for param_b, low_b, grad_b in blocks(param, low, grad):
        w = load_master(param_b, low_b)
        weight_grad = _add_in_order(weight_grad, _block_dots(w, grad_b))
        weight_weight = _add_in_order(weight_weight, _block_dots(w, w))
        grad_grad = _add_in_order(grad_grad, _block_dots(grad_b, grad_b))
    return weight_grad, weight_weight, grad_grad


@one_pass
def project_(param: Tensor, low: Tensor | None, grad: Tensor, coefficient: float, rescale: float) -> None:
    for param_b, low_b, grad_b in blocks(param, low, grad):
        along = torch.mul(load_master(param_b, low_b), coefficient, out=scratch("t", grad_b))
        grad_b.copy_(torch.sub(_as_float32(grad_b, "g"), along, out=along).mul_(rescale))


def _block_dots(a: Tensor, b: Tensor) -> list[float]:
    """The dot product of each 4096 elements, the last ones padded with zeros, as a tree in float64."""
    products = _wide(a, "wide")
    products.mul_(products if a is b else _wide(b, "wide2"))
    rows = products.view(-1, SUM_BLOCK)
    while (half := rows.shape[1] // 2) > 0:
        rows = rows[:, :half].add_(rows[:, half:])
    sums: list[float] = rows.view(-1).tolist()
    return sums


def _wide(block: Tensor, role: str) -> Tensor:
    """The block in float64 scratch memory, padded with zeros to whole blocks of 4096."""
    n = block.numel()
    wide = scratch(role, block, torch.float64, numel=-(-n // SUM_BLOCK) * SUM_BLOCK)
    wide[:n].copy_(block)
    wide[n:].zero_()
    return wide


def _add_in_order(total: float, sums: list[float]) -> float:
    for value in sums:  # not sum(): since Python 3.12 it compensates the rounding
        total += value
    return total


def _as_float32(block: Tensor, role: str) -> Tensor:
    return block if block.dtype == torch.float32 else scratch(role, block).copy_(block)
