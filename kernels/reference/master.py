"""Splitting and joining masters, in plain torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .blocks import blocks, one_pass, scratch

CANONICAL_NAN = 0x7FC00000


@one_pass
def split_(master: Tensor, param: Tensor, low: Tensor) -> None:
    for master_block, param_block, low_block in blocks(master, param, low):
        split_block(master_block, param_block, low_block)


@one_pass
def join_(param: Tensor, low: Tensor, master: Tensor) -> None:
    for param_block, low_block, master_block in blocks(param, low, master):
        join_block(param_block, low_block, master_block)


def split_block(master: Tensor, param: Tensor, low: Tensor) -> None:
    """high = (bits + 0x8000) >> 16, low = the low 16 bits; NaN made canonical first."""
    bits = master.view(torch.int32)
    if math.isnan(float(master.sum())):  # some element may be NaN; looking for it in every block would cost more
        bits = scratch("bits", master, torch.int32).copy_(bits)
        bits.masked_fill_(torch.isnan(master), CANONICAL_NAN)
    low.copy_(bits)  # a cast to int16 keeps the low 16 bits
    rounded = torch.add(bits, 0x8000, out=scratch("rounded", master, torch.int32))
    param.view(torch.int16).copy_(rounded.bitwise_right_shift_(16))


def join_block(param: Tensor, low: Tensor, master: Tensor) -> None:
    """bits = (high << 16) + low."""
    master.copy_(param)  # widening bf16 is the shift
    master.view(torch.int32).add_(scratch("bits", master, torch.int32).copy_(low))


def load_master(param: Tensor, low: Tensor | None) -> Tensor:
    """The fp32 master of a block: `param` itself, or scratch memory that holds the joined halves."""
    if low is None:
        return param
    master = scratch("p", param)
    join_block(param, low, master)
    return master


def store_master(master: Tensor, param: Tensor, low: Tensor | None) -> None:
    """Put back what `load_master` gave."""
    if low is not None:
        split_block(master, param, low)
