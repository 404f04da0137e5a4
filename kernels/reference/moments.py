"""Adam with bf16 and with 8-bit moments in plain torch; the formats are described in `offload.kernels.moments`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..factors import AdamFactors
from ..rounding import Rounding
from .blocks import blocks
from .master import CANONICAL_NAN, load_master, store_master
from .optimizer import adam_block, gradient, sqrt_

QUANT_BLOCK = 256
_MASK32 = 0xFFFFFFFF


@torch.no_grad()
def adam_bf16_(
    param: Tensor,
    low: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    factors: AdamFactors,
    rounding: Rounding,
) -> None:
    done = 0
    for param_b, low_b, exp_avg_b, exp_avg_sq_b, grad_b in blocks(param, low, exp_avg, exp_avg_sq, grad):
        m, v = exp_avg_b.float(), exp_avg_sq_b.float()
        p = load_master(param_b, low_b)
        adam_block(p, m, v, gradient(grad_b, p, factors.grad_scale, factors.l2), factors)
        random = random_bits(rounding, done, p.numel(), p.device)
        round_stochastically(m, random & 0xFFFF, exp_avg_b)
        round_stochastically(v, random >> 16, exp_avg_sq_b)
        store_master(p, param_b, low_b)
        done += p.numel()


@torch.no_grad()
def adam_8bit_(
    param: Tensor,
    low: Tensor | None,
    exp_avg: Tensor,
    exp_avg_scale: Tensor,
    exp_avg_sq: Tensor,
    exp_avg_sq_scale: Tensor,
    grad: Tensor,
    factors: AdamFactors,
) -> None:
    done = 0
    for param_b, low_b, m_codes, v_codes, grad_b in blocks(param, low, exp_avg, exp_avg_sq, grad):
        n = param_b.numel()
        scales = slice(done // QUANT_BLOCK, -(-(done + n) // QUANT_BLOCK))
        m, v = decode_signed(m_codes, exp_avg_scale[scales]), decode_positive(v_codes, exp_avg_sq_scale[scales])
        p = load_master(param_b, low_b)
        adam_block(p, m, v, gradient(grad_b, p, factors.grad_scale, factors.l2), factors)
        encode_signed(m, m_codes, exp_avg_scale[scales])
        encode_positive(v, v_codes, exp_avg_sq_scale[scales])
        store_master(p, param_b, low_b)
        done += n


def random_bits(rounding: Rounding, start: int, n: int, device: torch.device) -> Tensor:
    """[n] int64 in 0 .. 2^32 - 1: the random numbers of the elements from `first_index + start` on."""
    key0, key1 = rounding.key_pair()
    first = rounding.first_index + start
    index = torch.arange(first, first + n, dtype=torch.int64, device=device)
    return _mix(_mix((index & _MASK32) ^ key0) ^ (index >> 32) ^ key1)


def round_stochastically(value: Tensor, random: Tensor, target: Tensor) -> None:
    """target [n] bf16 = the high half of the pattern of `value` [n] fp32 plus `random` [n] in 0 .. 65535."""
    bits = (value.view(torch.int32).to(torch.int64) + random) >> 16
    bits = torch.where(torch.isnan(value), CANONICAL_NAN >> 16, bits)
    target.view(torch.int16).copy_(bits)


def encode_signed(value: Tensor, codes: Tensor, scales: Tensor) -> None:
    """codes [n] int8 and scales [ceil(n / 256)] fp32 of `value` [n] fp32."""
    rows = _rows(value)
    scale = _largest_magnitude(rows)
    q = torch.round(sqrt_(rows.abs() / scale).mul_(127.0))
    q = torch.where(rows.view(torch.int32) < 0, -q, q)
    codes.copy_(torch.where(_usable(scale), q, 0.0).view(-1)[: codes.numel()])
    scales.copy_(scale.view(-1))


def encode_positive(value: Tensor, codes: Tensor, scales: Tensor) -> None:
    """codes [n] uint8 and scales [ceil(n / 256)] fp32 of `value` [n] fp32, not negative."""
    rows = _rows(value)
    scale = _largest_magnitude(rows)
    q = torch.round(sqrt_(sqrt_(rows / scale)).mul_(255.0))
    q = torch.where((rows > 0.0) & (q < 1.0), 1.0, q)
    codes.copy_(torch.where(_usable(scale), q, 0.0).view(-1)[: codes.numel()])
    scales.copy_(scale.view(-1))


def decode_signed(codes: Tensor, scales: Tensor) -> Tensor:
    """[n] fp32: scale * sign(q) * (q / 127)^2."""
    q = codes.to(torch.int32)
    return _spread(scales, codes.numel()) * ((q * q.abs()).float() * (1.0 / 16129.0))


def decode_positive(codes: Tensor, scales: Tensor) -> Tensor:
    """[n] fp32: scale * (q / 255)^4."""
    q = codes.to(torch.int32)
    root = (q * q).float() * (1.0 / 65025.0)
    return _spread(scales, codes.numel()) * (root * root)


def _rows(value: Tensor) -> Tensor:
    return F.pad(value, (0, -value.numel() % QUANT_BLOCK)).view(-1, QUANT_BLOCK)


def _largest_magnitude(rows: Tensor) -> Tensor:
    """[rows, 1]; taken over the patterns, where NaN lies above infinity, so that it is not lost."""
    return (rows.view(torch.int32) & 0x7FFFFFFF).amax(dim=1, keepdim=True).view(torch.float32)


def _usable(scale: Tensor) -> Tensor:
    return (scale > 0.0) & (scale < float("inf"))


def _spread(scales: Tensor, n: int) -> Tensor:
    return scales.repeat_interleave(QUANT_BLOCK)[:n]


def _mix(x: Tensor) -> Tensor:
    """A 32-bit hash in int64 numbers; products wrap, and the mask keeps their low 32 bits."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK32
    return x ^ (x >> 16)
