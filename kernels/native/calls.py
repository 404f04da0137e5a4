"""The native implementation: each function hands pointers of checked tensors to the C function of the same name.

Same signatures and same bits as the modules of `reference`; the arguments were checked by the public functions.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..factors import AdamFactors, SgdFactors
from .library import AdamStruct, SgdStruct, load

_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def adam_(
    param: Tensor, low: Tensor | None, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, factors: AdamFactors
) -> None:
    struct = AdamStruct(*(getattr(factors, name) for name, _ in AdamStruct._fields_))
    load().offl_adam(
        _DTYPE_CODES[grad.dtype],
        param.numel(),
        param.data_ptr(),
        _pointer(low),
        exp_avg.data_ptr(),
        exp_avg_sq.data_ptr(),
        grad.data_ptr(),
        ctypes.byref(struct),
    )


def sgd_(
    param: Tensor, low: Tensor | None, momentum_buffer: Tensor | None, grad: Tensor, factors: SgdFactors
) -> None:
    struct = SgdStruct(*(getattr(factors, name) for name, _ in SgdStruct._fields_))
    load().offl_sgd(
        _DTYPE_CODES[grad.dtype],
        param.numel(),
        param.data_ptr(),
        _pointer(low),
        _pointer(momentum_buffer),
        grad.data_ptr(),
        ctypes.byref(struct),
    )


def split_(master: Tensor, param: Tensor, low: Tensor) -> None:
    load().offl_split(master.numel(), master.data_ptr(), param.data_ptr(), low.data_ptr())


def join_(param: Tensor, low: Tensor, master: Tensor) -> None:
    load().offl_join(master.numel(), master.data_ptr(), param.data_ptr(), low.data_ptr())


def squared_norm(flat: Tensor) -> float:
    return load().offl_squared_norm(_DTYPE_CODES[flat.dtype], flat.numel(), flat.data_ptr())


def accumulate_(acc: Tensor, grad: Tensor) -> None:
    codes = _DTYPE_CODES[acc.dtype], _DTYPE_CODES[grad.dtype]
    load().offl_accumulate(*codes, acc.numel(), acc.data_ptr(), grad.data_ptr())


def copy_(dst: Tensor, src: Tensor) -> None:
    codes = _DTYPE_CODES[dst.dtype], _DTYPE_CODES[src.dtype]
    load().offl_copy(*codes, dst.numel(), dst.data_ptr(), src.data_ptr())
