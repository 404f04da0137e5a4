"""Losses that never hold the logits of all tokens: chunked linear + cross-entropy, and StableMax cross-entropy.

    softmax:    loss = log(sum_j exp(z_j)) - z_y              dz_j = exp(z_j) / sum_k exp(z_k) - [j = y]
    stablemax:  loss = log(sum_j s(z_j)) - log(s(z_y))        dz_j = s'(z_j) / sum_k s(z_k) - [j = y] s'(z_y) / s(z_y)
                s(z) = z + 1 for z >= 0, 1 / (1 - z) for z < 0; s' = 1, s^2

StableMax grows linearly and decays as 1/|z|, so probabilities never round to 0 or 1 and a gradient is left: Prieto et
al., Grokking at the Edge of Numerical Stability, arXiv:2501.04697. It is computed in float64, as there.

`linear_cross_entropy` computes the gradients in its forward pass, one chunk of tokens at a time: the logits of a chunk
are made, turned into their gradient in place, multiplied into the gradients of hidden states and weight, and dropped.
Backward only scales them and does not need the weight again. After Hsu et al., Liger Kernel, arXiv:2410.10989.
Peak memory: chunk_tokens * vocabulary logits instead of tokens * vocabulary; weight gradients gather in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dispatch import uses_triton

KINDS = ("softmax", "stablemax")
_CHUNK_LOGITS = 1 << 24  # logits held at once: 64 MiB in fp32


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    kind: str = "softmax",
    ignore_index: int = -100,
    reduction: str = "mean",
    chunk_tokens: int | None = None,
) -> Tensor:
    """Cross-entropy of `hidden @ weight.T + bias` against `target`, chunk by chunk.

    Bits depend on `chunk_tokens`, because matrix products and the sums over tokens are cut differently.

    Args:
        hidden: [tokens, width] fp32, bf16, fp16 (or fp64); weight: [vocabulary, width], bias: [vocabulary], same dtype.
        target: [tokens] int64; tokens whose target is `ignore_index` count neither in the loss nor in the mean.
        kind: "softmax" or "stablemax".
        reduction: "mean" over the counted tokens, or "sum".
        chunk_tokens: tokens per chunk; by default as many as give 16M logits.
    Returns: scalar; fp32 for softmax (fp64 for fp64 input), fp64 for stablemax. NaN for the mean over no tokens.
    Raises: ValueError for other shapes, dtypes, kinds, reductions or chunk sizes.
    """
    _check_choice("kind", kind, KINDS)
    _check_choice("reduction", reduction, ("mean", "sum"))
    _check_linear(hidden, weight, bias, target)
    if chunk_tokens is None:
        chunk_tokens = max(1, _CHUNK_LOGITS // weight.shape[0])
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}; expected at least 1.")
    total: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, target, kind, ignore_index, chunk_tokens)
    return total / (target != ignore_index).sum() if reduction == "mean" else total


def stablemax_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    chunk_tokens: int | None = None,
) -> Tensor:
    """StableMax cross-entropy of logits that exist already; the float64 numbers are made one chunk at a time.

    Args:
        logits: [tokens, vocabulary] of any float dtype; target: [tokens] int64.
        reduction: "mean" over the counted tokens, "sum", or "none": [tokens], 0 where ignored.
    Returns: fp64.
    Raises: ValueError for other shapes or reductions.
    """
    _check_choice("reduction", reduction, ("mean", "sum", "none"))
    if logits.dim() != 2 or target.shape != logits.shape[:1]:
        raise ValueError(
            f"logits have shape {tuple(logits.shape)}, target {tuple(target.shape)}; expected [tokens, vocabulary] and "
            "[tokens]. Flatten batch and sequence first."
        )
    rows = chunk_tokens or max(1, _CHUNK_LOGITS // max(1, logits.shape[1]))
    losses: Tensor = _StableMax.apply(logits, target, ignore_index, rows)
    if reduction == "none":
        return losses
    return losses.sum() / (target != ignore_index).sum() if reduction == "mean" else losses.sum()


def stablemax(logits: Tensor) -> Tensor:
    """Probabilities s(z) / sum s(z) over the last dimension, in float64."""
    s, _ = _stable_scale(logits.double())
    return s / s.sum(dim=-1, keepdim=True)


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of the losses; the gradients are made in forward, where the logits are."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        kind: str,
        ignore_index: int,
        chunk_tokens: int,
    ) -> Tensor:
        wants = ctx.needs_input_grad
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        grad_hidden = torch.empty_like(hidden) if wants[0] else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if wants[1] else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and wants[2] else None
        wants_gradient = any(wants[:3])
        total = torch.zeros((), dtype=torch.float64 if kind == "stablemax" else wide, device=hidden.device)
        for start in range(0, hidden.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            logits = torch.nn.functional.linear(hidden[rows], weight, bias)
            losses, gradient = _losses(logits, target[rows], kind, ignore_index, wants_gradient)
            total += losses.sum()
            if gradient is None:
                continue
            if grad_hidden is not None:
                torch.mm(gradient, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                _add_product(grad_weight, gradient, hidden[rows])
            if grad_bias is not None:
                grad_bias += gradient.sum(dim=0, dtype=wide)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, grad_bias = (
            None if gradient is None else (gradient * grad_output).to(ctx.dtype) for gradient in ctx.saved_tensors
        )
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


class _StableMax(torch.autograd.Function):
    """[tokens] losses; keeps the logits and makes the float64 numbers again in backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, ignore_index: int, chunk_tokens: int) -> Tensor:
        ctx.save_for_backward(logits, target)
        ctx.ignore_index, ctx.chunk_tokens = ignore_index, chunk_tokens
        losses = torch.zeros(logits.shape[0], dtype=torch.float64, device=logits.device)
        for start in range(0, logits.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            losses[rows], _ = _stablemax_losses(logits[rows], target[rows], ignore_index, False)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        logits, target = ctx.saved_tensors
        grad = torch.empty_like(logits)
        for start in range(0, logits.shape[0], ctx.chunk_tokens):
            rows = slice(start, start + ctx.chunk_tokens)
            _, gradient = _stablemax_losses(logits[rows], target[rows], ctx.ignore_index, True)
            assert gradient is not None
            grad[rows] = gradient * grad_output[rows, None]
        return grad, None, None, None


def _losses(
    logits: Tensor, target: Tensor, kind: str, ignore_index: int, wants_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """[rows] losses and, if wanted, [rows, vocabulary] gradients in the logits' dtype; may overwrite the logits."""
    if kind == "stablemax":
        losses, gradient = _stablemax_losses(logits, target, ignore_index, wants_gradient)
        return losses, None if gradient is None else gradient.to(logits.dtype)
    if uses_triton(logits.device) and logits.dtype != torch.float64:
        from .triton.loss import cross_entropy_

        losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
        cross_entropy_(logits, target, losses, ignore_index, 1.0 if wants_gradient else None)
        return losses, logits if wants_gradient else None
    return _softmax_losses(logits, target, ignore_index, wants_gradient)


def _softmax_losses(
    logits: Tensor, target: Tensor, ignore_index: int, wants_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    used, index = _labels(target, ignore_index)
    z = logits if logits.dtype == torch.float64 else logits.float()
    log_total = torch.logsumexp(z, dim=1, keepdim=True)
    losses = torch.where(used, (log_total - z.gather(1, index))[:, 0], 0.0)
    if not wants_gradient:
        return losses, None
    gradient = z.sub_(log_total).exp_()
    gradient.scatter_add_(1, index, torch.full_like(log_total, -1.0))
    return losses, gradient.masked_fill_(~used[:, None], 0.0).to(logits.dtype)


def _stablemax_losses(
    logits: Tensor, target: Tensor, ignore_index: int, wants_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    used, index = _labels(target, ignore_index)
    s, slope = _stable_scale(logits.double())
    total = s.sum(dim=1, keepdim=True)
    chosen = s.gather(1, index)
    losses = torch.where(used, (total.log() - chosen.log())[:, 0], 0.0)
    if not wants_gradient:
        return losses, None
    gradient = slope / total
    gradient.scatter_add_(1, index, -slope.gather(1, index) / chosen)
    return losses, gradient.masked_fill_(~used[:, None], 0.0)


def _stable_scale(z: Tensor) -> tuple[Tensor, Tensor]:
    """s(z) and s'(z); the clamp keeps the unused branch away from its pole at z = 1."""
    below = 1.0 / (1.0 - z.clamp(max=0.0))
    positive = z >= 0.0
    return torch.where(positive, z + 1.0, below), torch.where(positive, 1.0, below * below)


def _labels(target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """[rows] bool: counts; [rows, 1]: the class, 0 where it does not count."""
    used = target != ignore_index
    return used, torch.where(used, target, 0)[:, None]


def _add_product(total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    """total += gradient.T @ hidden, in the dtype of `total`."""
    if total.dtype == gradient.dtype:
        total.addmm_(gradient.T, hidden)
    else:
        total += gradient.T @ hidden


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(allowed)}.")


def _check_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or target.shape != hidden.shape[:1]:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)}, weight {tuple(weight.shape)}, target {tuple(target.shape)}; "
            "expected [tokens, width], [vocabulary, width], [tokens]. Flatten batch and sequence first."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}; expected [{weight.shape[0]}], one for each class.")
    dtypes = {tensor.dtype for tensor in (hidden, weight, bias) if tensor is not None}
    if len(dtypes) != 1 or not hidden.is_floating_point():
        raise ValueError(f"hidden, weight, bias have the dtypes {sorted(map(str, dtypes))}; expected one float dtype.")
