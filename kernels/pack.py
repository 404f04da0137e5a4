"""One flat buffer for the parameters that travel together, and views of it in their shapes.

The views are made once; after that a unit is one contiguous range, and moving or casting it is one `gradient.copy_` of
the whole buffer, never one copy per parameter.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class FlatLayout:
    """Where each tensor lies in a flat buffer.

    Args:
        shapes: of the tensors, in order.
        alignment: every tensor starts at a multiple of so many elements; the gaps hold zeros.
    Raises: ValueError for an alignment below 1.
    """

    shapes: tuple[tuple[int, ...], ...]
    alignment: int = 64

    def __post_init__(self) -> None:
        if self.alignment < 1:
            raise ValueError(f"FlatLayout.alignment is {self.alignment} elements; expected at least 1.")

    @classmethod
    def of(cls, tensors: Sequence[Tensor], alignment: int = 64) -> FlatLayout:
        """The layout that holds `tensors`."""
        return cls(shapes=tuple(tuple(tensor.shape) for tensor in tensors), alignment=alignment)

    @property
    def offsets(self) -> tuple[int, ...]:
        """First element of each tensor."""
        return tuple(self._bounds()[:-1])

    @property
    def numel(self) -> int:
        """Elements of the whole buffer, the gaps included."""
        return self._bounds()[-1]

    def views(self, flat: Tensor) -> tuple[Tensor, ...]:
        """The tensors as views of `flat` [numel]; writing to one writes to the buffer.

        Raises: ValueError if `flat` is not contiguous or of another length.
        """
        if flat.dim() != 1 or not flat.is_contiguous() or flat.numel() != self.numel:
            raise ValueError(
                f"The flat buffer has shape {tuple(flat.shape)}, strides {flat.stride()}; the layout needs a "
                f"contiguous one of [{self.numel}]."
            )
        return tuple(
            flat[offset : offset + math.prod(shape)].view(shape)
            for offset, shape in zip(self.offsets, self.shapes, strict=True)
        )

    def _bounds(self) -> list[int]:
        sizes = (-(-math.prod(shape) // self.alignment) * self.alignment for shape in self.shapes)
        return list(itertools.accumulate(sizes, initial=0))


@torch.no_grad()
def pack_(flat: Tensor, tensors: Sequence[Tensor], layout: FlatLayout) -> None:
    """Copy `tensors` into `flat`, cast to its dtype, and zero the gaps between them.

    Raises: ValueError if they do not have the shapes of `layout`.
    """
    _check_shapes(tensors, layout)
    flat.zero_()
    for view, tensor in zip(layout.views(flat), tensors, strict=True):
        view.copy_(tensor)


@torch.no_grad()
def unpack_(tensors: Sequence[Tensor], flat: Tensor, layout: FlatLayout) -> None:
    """Copy the parts of `flat` into `tensors`, cast to their dtypes.

    Raises: ValueError if they do not have the shapes of `layout`.
    """
    _check_shapes(tensors, layout)
    for view, tensor in zip(layout.views(flat), tensors, strict=True):
        tensor.copy_(view)


def _check_shapes(tensors: Sequence[Tensor], layout: FlatLayout) -> None:
    shapes = tuple(tuple(tensor.shape) for tensor in tensors)
    if shapes != layout.shapes:
        raise ValueError(f"The tensors have the shapes {shapes}; the layout was made for {layout.shapes}.")
