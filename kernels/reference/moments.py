"""Adam with bf16 and with 8-bit moments in plain torch; the formats are described in `offload.kernels.moments`."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..factors import AdamFactors
from ..rounding import Rounding
from .blocks import blocks, one_pass, scratch
from .master import load_master, store_master
from .optimizer import adam_block, gradient, sqrt_

QUANT_BLOCK = 256
_MASK32 = 0xFFFFFFFF


@one_pass
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
        m, v = scratch("m", param_b).copy_(exp_avg_b), scratch("v", param_b).copy_(exp_avg_sq_b)
        p = load_master(param_b, low_b)
        adam_block(p, m, v, gradient(grad_b, p, factors.grad_scale, factors.l2), factors)
        random = random_bits(rounding, done, p.numel(), p.device)
        half = torch.bitwise_and(random, 0xFFFF, out=scratch("half", p, torch.int32))
        round_stochastically(m, half, exp_avg_b)
        round_stochastically(v, random.bitwise_right_shift_(16).bitwise_and_(0xFFFF), exp_avg_sq_b)
        store_master(p, param_b, low_b)
        done += p.numel()


@one_pass
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
    """[n] int32 patterns of the random numbers of the elements from `first_index + start` on."""
    key0, key1 = rounding.key_pair()
    first = rounding.first_index + start
    x = torch.arange(n, dtype=torch.int32, device=device)
    until_carry = min(n, (1 << 32) - (first & _MASK32))  # elements whose index has the same high word as the first
    high = [(x[:until_carry], first >> 32), (x[until_carry:], (first >> 32) + 1)]
    _mix_(x.add_(_signed(first)).bitwise_xor_(_signed(key0)))
    for part, word in high:
        part.bitwise_xor_(_signed(word ^ key1))
    return _mix_(x)


def round_stochastically(value: Tensor, random: Tensor, target: Tensor) -> None:
    """target [n] bf16 = the high half of the pattern of `value` [n] fp32 plus `random` [n] int32 in 0 .. 65535.

    The sum passes the largest int32 only where `value` is NaN, and NaN is written afterwards.
    """
    bits = torch.add(value.view(torch.int32), random, out=random)
    target.view(torch.int16).copy_(bits.bitwise_right_shift_(16))
    if math.isnan(float(value.sum())):
        target.masked_fill_(torch.isnan(value), math.nan)


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


def _mix_(x: Tensor) -> Tensor:
    """The 32-bit hash of `offload.kernels.rounding` on int32 patterns, in place; products wrap."""
    _xor_shifted_(x, 16).mul_(_signed(0x7FEB352D))
    _xor_shifted_(x, 15).mul_(_signed(0x846CA68B))
    return _xor_shifted_(x, 16)


def _xor_shifted_(x: Tensor, count: int) -> Tensor:
    """x ^= x >> count, where zeros come in from above: int32 shifts bring in the sign."""
    return x.bitwise_xor_((x >> count).bitwise_and_(_MASK32 >> count))


def _signed(pattern: int) -> int:
    """The int32 number with the low 32 bits of `pattern`."""
    return ((pattern & _MASK32) ^ 0x80000000) - 0x80000000
