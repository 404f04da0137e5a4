"""Passes over gradients in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .blocks import blocks, scratch

NORM_BLOCK = 4096


@torch.no_grad()
def squared_norm(flat: Tensor) -> float:
    total = 0.0
    for (block,) in blocks(flat):
        padding = -block.numel() % NORM_BLOCK
        sums = F.pad(block, (0, padding)).to(torch.float64).view(-1, NORM_BLOCK)
        sums = sums.mul_(sums)
        while (half := sums.shape[1] // 2) > 0:
            sums = sums[:, :half].add_(sums[:, half:])
        for block_sum in sums.view(-1).tolist():
            total += block_sum
    return total


@torch.no_grad()
def accumulate_(acc: Tensor, grad: Tensor) -> None:
    for acc_b, grad_b in blocks(acc, grad):
        acc_b.copy_(_as_float32(acc_b, "g").add_(_as_float32(grad_b, "t")))


@torch.no_grad()
def copy_(dst: Tensor, src: Tensor) -> None:
    for dst_b, src_b in blocks(dst, src):
        dst_b.copy_(_as_float32(src_b, "t"))


def _as_float32(block: Tensor, role: str) -> Tensor:
    return block if block.dtype == torch.float32 else scratch(role, block).copy_(block)
