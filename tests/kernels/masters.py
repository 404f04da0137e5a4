"""Masters of the kernel tests: hard values in one fp32 tensor or split into halves."""

from __future__ import annotations

import torch
from torch import Tensor

from offload.kernels.master import split_

from .bits import any_values


def make_master(n: int, offset: int, is_split: bool, seed: int) -> tuple[Tensor, Tensor | None]:
    """(param, low) of `n` elements that start `offset` elements into their storage; low is None if not split."""
    whole = any_values(n + offset, torch.float32, seed)
    if not is_split:
        return whole[offset:], None
    param, low = torch.empty_like(whole, dtype=torch.bfloat16), torch.empty_like(whole, dtype=torch.int16)
    split_(whole, param, low)
    return param[offset:], low[offset:]
