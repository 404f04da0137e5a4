"""The door to compiled kernels: each method hands pointers of checked tensors to the function of the same name.

Same signatures and same bits as the functions of `reference`; the arguments were checked by the public functions.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..factors import AdamFactors, SgdFactors
from ..rounding import Rounding
from .library import AdamStruct, RoundingStruct, SgdStruct

_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Calls:
    """Calls into one library.

    Args:
        library: has the functions `offl_*` of `library.SIGNATURES`, which release the GIL.
    """

    def __init__(self, library: Any) -> None:
        self._library = library

    def adam_(
        self, param: Tensor, low: Tensor | None, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, factors: AdamFactors
    ) -> None:
        tensors = _pointers(param, low, exp_avg, exp_avg_sq, grad)
        self._library.offl_adam(_DTYPE_CODES[grad.dtype], param.numel(), *tensors, _adam_struct(factors))

    def adam_bf16_(
        self,
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
        self._library.offl_adam_bf16(_DTYPE_CODES[grad.dtype], param.numel(), *tensors, _adam_struct(factors), struct)

    def adam_8bit_(
        self,
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
        self._library.offl_adam_8bit(_DTYPE_CODES[grad.dtype], param.numel(), *tensors, _adam_struct(factors))

    def sgd_(
        self, param: Tensor, low: Tensor | None, momentum_buffer: Tensor | None, grad: Tensor, factors: SgdFactors
    ) -> None:
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
        self._library.offl_sgd(_DTYPE_CODES[grad.dtype], param.numel(), *tensors, struct)

    def split_(self, master: Tensor, param: Tensor, low: Tensor) -> None:
        self._library.offl_split(master.numel(), *_pointers(master, param, low))

    def join_(self, param: Tensor, low: Tensor, master: Tensor) -> None:
        self._library.offl_join(master.numel(), *_pointers(master, param, low))

    def squared_norm(self, flat: Tensor) -> float:
        return self._library.offl_squared_norm(_DTYPE_CODES[flat.dtype], flat.numel(), flat.data_ptr())

    def accumulate_(self, acc: Tensor, grad: Tensor) -> None:
        self._library.offl_accumulate(*_pair(acc, grad))

    def copy_(self, dst: Tensor, src: Tensor) -> None:
        self._library.offl_copy(*_pair(dst, src))

    def copy_squared_norm_(self, dst: Tensor, src: Tensor) -> float:
        return self._library.offl_copy_squared_norm(*_pair(dst, src))

    def accumulate_squared_norm_(self, acc: Tensor, grad: Tensor) -> float:
        return self._library.offl_accumulate_squared_norm(*_pair(acc, grad))

    def scale_(self, flat: Tensor, factor: float) -> None:
        self._library.offl_scale(_DTYPE_CODES[flat.dtype], flat.numel(), flat.data_ptr(), factor)

    def projection_sums(self, param: Tensor, low: Tensor | None, grad: Tensor) -> tuple[float, float, float]:
        sums = (ctypes.c_double * 3)()
        tensors = _pointers(param, low, grad)
        self._library.offl_projection_sums(_DTYPE_CODES[grad.dtype], grad.numel(), *tensors, ctypes.addressof(sums))
        return sums[0], sums[1], sums[2]

    def project_(self, param: Tensor, low: Tensor | None, grad: Tensor, coefficient: float, rescale: float) -> None:
        tensors = _pointers(param, low, grad)
        self._library.offl_project(_DTYPE_CODES[grad.dtype], grad.numel(), *tensors, coefficient, rescale)


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
