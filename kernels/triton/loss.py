"""Cross-entropy over a chunk of logits in Triton: the loss of each row, and its gradient in the logits' place.

    loss = log(sum_j exp(z_j)) - z_y        dz_j = (exp(z_j) / sum_k exp(z_k) - [j = y]) * scale

Two passes over a row: a running maximum and sum (Milakov and Gimelshein, Online normalizer calculation for softmax,
arXiv:1805.02867), then the gradient. 3 times the logits' bytes are moved, once without the gradient.
"""

# mypy: disable-error-code="no-untyped-def"
# Parameters of device functions are Triton values, which have no static types.

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .formats import as_float32, code, from_float32, raw

BLOCK = 4096
OPTIONS: dict[str, Any] = {"num_warps": 8}


@triton.jit
def cross_entropy_kernel(
    logits,
    target,
    loss,
    vocabulary,
    stride,
    ignore_index,
    scale,
    CODE: tl.constexpr,
    GRADIENT: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,  # a run-time bound of a loop fails in the interpreter of Triton 3.6 with recent numpy
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    label = tl.load(target + row)
    largest = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for block in range(NUM_BLOCKS):
        at = block * BLOCK + tl.arange(0, BLOCK)
        mask = at < vocabulary
        z = as_float32(tl.load(logits + at, mask=mask, other=0), CODE)
        z = tl.where(mask, z, float("-inf"))
        larger = tl.maximum(largest, tl.max(z, axis=0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(z - larger), axis=0)
        largest = larger
    used = label != ignore_index
    index = tl.where(used, label, 0)
    chosen = as_float32(tl.load(logits + index), CODE)
    tl.store(loss + row, tl.where(used, tl.log(total) + largest - chosen, 0.0))
    if GRADIENT:
        tl.debug_barrier()  # every thread has read the label's logit before one overwrites it
        scale = tl.where(used, scale, 0.0)
        for block in range(NUM_BLOCKS):
            at = block * BLOCK + tl.arange(0, BLOCK)
            mask = at < vocabulary
            z = as_float32(tl.load(logits + at, mask=mask, other=0), CODE)
            probability = tl.exp(z - largest) / total
            gradient = tl.where(at == index, probability - 1.0, probability) * scale
            gradient = tl.where(used, gradient, 0.0)
            tl.store(logits + at, from_float32(gradient, CODE), mask=mask)


def cross_entropy_(logits: Tensor, target: Tensor, loss: Tensor, ignore_index: int, scale: float | None) -> None:
    """Write the loss of each row; with a scale, overwrite the logits with their gradient times it.

    Args:
        logits: [rows, vocabulary] fp32, bf16 or fp16, rows contiguous; target: [rows] int64; loss: [rows] fp32.
    """
    cross_entropy_kernel[(logits.shape[0],)](
        raw(logits),
        target,
        loss,
        logits.shape[1],
        logits.stride(0),
        ignore_index,
        0.0 if scale is None else scale,
        CODE=code(logits),
        GRADIENT=scale is not None,
        NUM_BLOCKS=triton.cdiv(logits.shape[1], BLOCK),
        BLOCK=BLOCK,
        **OPTIONS,
    )
