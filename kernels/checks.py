"""Checks of the arguments of the public kernels: flat, contiguous, one length, one device, known dtypes."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check_flat(**tensors: Tensor | None) -> int:
    """Raise ValueError unless all are 1-D, contiguous, of one length and on one device; returns the length.

    None is passed over. The first tensor sets the length and the device. Kernels are called for every chunk, so what
    is right costs three attributes per tensor, and only what is wrong is looked at closely.
    """
    first: Tensor | None = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if first is None:
            first, shape, device = tensor, tensor.shape, tensor.device
        if tensor.shape != shape or tensor.device != device or len(shape) != 1 or not tensor.is_contiguous():
            _complain(name, tensor, next(iter(tensors)), first)
    assert first is not None
    return first.numel()


def _complain(name: str, tensor: Tensor, first_name: str, first: Tensor) -> None:
    if tensor.dim() != 1 or not tensor.is_contiguous():
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, strides {tensor.stride()}; expected a contiguous 1-D tensor. "
            "Pass a slice of the flat buffer, or view(-1)."
        )
    if tensor.numel() != first.numel():
        raise ValueError(f"{name} has {tensor.numel()} elements, {first_name} has {first.numel()}; expected equal.")
    raise ValueError(f"{name} is on {tensor.device}, {first_name} on {first.device}; expected one device.")


def check_dtype(name: str, tensor: Tensor, *allowed: torch.dtype) -> None:
    """Raise ValueError unless `tensor` has one of the `allowed` dtypes."""
    if tensor.dtype not in allowed:
        raise ValueError(f"{name} is {tensor.dtype}; expected {' or '.join(str(dtype) for dtype in allowed)}.")


def check_master(param: Tensor, low: Tensor | None) -> None:
    """Raise ValueError unless (param, low) is (fp32, None) or (bf16, int16)."""
    if low is None:
        if param.dtype != torch.float32:
            raise ValueError(
                f"param is {param.dtype} without low; expected float32 (its own master), or bfloat16 with an int16 low."
            )
        return
    check_dtype("param", param, torch.bfloat16)
    check_dtype("low", low, torch.int16)
