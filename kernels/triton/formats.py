"""Device functions shared by the Triton kernels: number formats, the split master, and how a kernel is launched.

bf16 buffers travel as int16 and are converted with integer operations, so that the rounding is the one written here
and not one that a compiler version chooses.
"""

# mypy: disable-error-code="no-untyped-def"
# Parameters of device functions are Triton values, which have no static types.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

F32, BF16, F16 = 0, 1, 2
_CODES = {torch.float32: F32, torch.bfloat16: BF16, torch.float16: F16}

OPTIONS: dict[str, Any] = {
    "num_warps": 4,
    "enable_fp_fusion": False,  # a fused multiply-add rounds once where the definition rounds twice
}


@dataclass(frozen=True)
class Shape:
    """How an element-wise kernel is cut into programs. The bits are the same for each."""

    block: int  # elements per program; 8 or 16 a thread, so that a thread's 16-bit loads are 16 bytes wide
    num_warps: int

    @property
    def options(self) -> dict[str, Any]:
        """What a launch is given besides the kernel's own arguments."""
        return OPTIONS | {"BLOCK": self.block, "num_warps": self.num_warps}


SHAPES = (Shape(1024, 4), Shape(512, 2), Shape(2048, 8), Shape(2048, 4))  # the first until `tuning.tune` chooses
_shape = SHAPES[0]


def current_shape() -> Shape:
    """The shape of the launches that follow. A call asks once, so that all its launches agree."""
    return _shape


def set_shape(shape: Shape) -> None:
    """Launch with `shape` from now on, in the whole process."""
    global _shape
    _shape = shape


def code(tensor: Tensor) -> int:
    """The number that stands for the dtype of `tensor` in kernel arguments."""
    return _CODES[tensor.dtype]


def raw(tensor: Tensor) -> Tensor:
    """`tensor`, or its int16 view if it is bf16."""
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


def parts(first: int, *tensors: Tensor | None) -> list[Tensor | None]:
    """What a kernel gets of flat tensors: their elements from `first` on, bf16 as int16; None stays None."""
    return [None if tensor is None else raw(tensor)[first:] for tensor in tensors]


def launches(n: int, block: int) -> list[tuple[int, int, int]]:
    """(first element, number of elements, number of programs) of the launches that cover n elements.

    The bulk is a multiple of 16 elements, which the compiler knows and uses: with any n the mask of a load could
    change from one element to the next, and all accesses would shrink to one element.
    """
    bulk = n - n % 16
    spans = [(0, bulk), (bulk, n - bulk)]
    return [(first, count, triton.cdiv(count, block)) for first, count in spans if count]


@triton.jit
def as_float32(values, CODE: tl.constexpr):
    """Values of a loaded fp32, bf16 (int16 patterns) or fp16 buffer in float32."""
    if CODE == 1:
        return (values.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return values.to(tl.float32)


@triton.jit
def from_float32(values, CODE: tl.constexpr):
    """float32 rounded to nearest even, as it is stored in an fp32, bf16 (int16 patterns) or fp16 buffer."""
    if CODE == 1:
        bits = values.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(values != values, 0x7FC0, rounded).to(tl.int16)
    elif CODE == 2:
        return values.to(tl.float16)
    else:
        return values


@triton.jit
def load_master(param, low, at, mask, IS_SPLIT: tl.constexpr):
    """The fp32 master of the elements `at`: (high << 16) + low, or the parameter itself."""
    if IS_SPLIT:
        high = tl.load(param + at, mask=mask, other=0).to(tl.int32)
        bits = (high << 16) + tl.load(low + at, mask=mask, other=0).to(tl.int32)
        return bits.to(tl.float32, bitcast=True)
    else:
        return tl.load(param + at, mask=mask, other=0.0)


@triton.jit
def store_master(param, low, at, mask, value, IS_SPLIT: tl.constexpr):
    """Store the master, rounded half up into its halves if it is split; NaN becomes 0x7fc00000."""
    if IS_SPLIT:
        bits = tl.where(value != value, 0x7FC00000, value.to(tl.int32, bitcast=True))
        tl.store(param + at, ((bits + 0x8000) >> 16).to(tl.int16), mask=mask)
        tl.store(low + at, bits.to(tl.int16), mask=mask)
    else:
        tl.store(param + at, value, mask=mask)
