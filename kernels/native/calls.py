"""The native implementation: each function hands pointers of checked tensors to the C function of the same name.

Same signatures and same bits as the modules of `reference`; the arguments were checked by the public functions.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

from ..factors import AdamFactors, SgdFactors
from ..rounding import Rounding
from .library import AdamStruct, RoundingStruct, SgdStruct, load

_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def adam_(
    param: Tensor, low: Tensor | None, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, factors: AdamFactors
) -> None:
    tensors = _pointers(param, low, exp_avg, exp_avg_sq, grad)
    load().offl_adam(_DTYPE_CODES[grad.dtype], param.numel(), *tensors, _adam_struct(factors))


def adam_bf16_(
    param: Tensor,
    low: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    factors: AdamFactors,
    rounding: Rounding,
) -> None:
    tensors = _pointers(param, low, exp_avg, exp_avg_sq, grad)
    struct = RoundingStruct(*rounding.key_pair(), rounding.first_index)
    load().offl_adam_bf16(_DTYPE_CODES[grad.dtype], param.numel(), *tensors, _adam_struct(factors), struct)


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
    tensors = _pointers(param, low, exp_avg, exp_avg_scale, exp_avg_sq, exp_avg_sq_scale, grad)
    load().offl_adam_8bit(_DTYPE_CODES[grad.dtype], param.numel(), *tensors, _adam_struct(factors))


def sgd_(param: Tensor, low: Tensor | None, momentum_buffer: Tensor | None, grad: Tensor, factors: SgdFactors) -> None:
    struct = SgdStruct(
        factors.grad_scale,
        factors.lr,
        factors.momentum,
        factors.one_minus_dampening,
        factors.l2,
        factors.nesterov,
        factors.first,
    )
    tensors = _pointers(param, low, momentum_buffer, grad)
    load().offl_sgd(_DTYPE_CODES[grad.dtype], param.numel(), *tensors, struct)


def split_(master: Tensor, param: Tensor, low: Tensor) -> None:
    load().offl_split(master.numel(), *_pointers(master, param, low))


def join_(param: Tensor, low: Tensor, master: Tensor) -> None:
    load().offl_join(master.numel(), *_pointers(master, param, low))


def squared_norm(flat: Tensor) -> float:
    return load().offl_squared_norm(_DTYPE_CODES[flat.dtype], flat.numel(), flat.data_ptr())


def accumulate_(acc: Tensor, grad: Tensor) -> None:
    load().offl_accumulate(*_pair(acc, grad))


def copy_(dst: Tensor, src: Tensor) -> None:
    load().offl_copy(*_pair(dst, src))


def copy_squared_norm_(dst: Tensor, src: Tensor) -> float:
    return load().offl_copy_squared_norm(*_pair(dst, src))


def accumulate_squared_norm_(acc: Tensor, grad: Tensor) -> float:
    return load().offl_accumulate_squared_norm(*_pair(acc, grad))


def scale_(flat: Tensor, factor: float) -> None:
    load().offl_scale(_DTYPE_CODES[flat.dtype], flat.numel(), flat.data_ptr(), factor)


def projection_sums(param: Tensor, low: Tensor | None, grad: Tensor) -> tuple[float, float, float]:
    sums = (ctypes.c_double * 3)()
    tensors = _pointers(param, low, grad)
    load().offl_projection_sums(_DTYPE_CODES[grad.dtype], grad.numel(), *tensors, ctypes.addressof(sums))
    return sums[0], sums[1], sums[2]


def project_(param: Tensor, low: Tensor | None, grad: Tensor, coefficient: float, rescale: float) -> None:
    tensors = _pointers(param, low, grad)
    load().offl_project(_DTYPE_CODES[grad.dtype], grad.numel(), *tensors, coefficient, rescale)


def _pointers(*tensors: Tensor | None) -> list[int | None]:
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


def _pair(target: Tensor, source: Tensor) -> tuple[int, int, int, int, int]:
    codes = _DTYPE_CODES[target.dtype], _DTYPE_CODES[source.dtype]
    return *codes, target.numel(), target.data_ptr(), source.data_ptr()


@lru_cache(maxsize=256)  # only read by the C side, so one struct may serve several threads
def _adam_struct(factors: AdamFactors) -> AdamStruct:
    return AdamStruct(
        factors.grad_scale,
        factors.one_minus_beta1,
        factors.beta2,
        factors.one_minus_beta2,
        factors.eps,
        factors.step_size,
        factors.decay,
        factors.l2,
    )
