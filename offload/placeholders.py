"""Released parameters: shape and dtype stay, the values are a NaN that takes no memory.

Each parameter has a placeholder of its own (one element of storage, zero strides), so that two released parameters
never look like aliases of each other.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_INTEGER_POISON = 0x5A


class PlaceholderOverwritten(RuntimeError):
    """Somebody wrote to, or replaced, the data of a parameter whose values live in the engine."""


class Placeholder:
    """The NaN (or, for integers, poison pattern) that stands in for one released parameter."""

    def __init__(self, name: str, parameter: nn.Parameter, dtype: torch.dtype, device: torch.device) -> None:
        self.name = name
        self._parameter = parameter
        with torch.inference_mode(False):
            element = torch.empty(1, dtype=dtype, device=device)
            if dtype.is_floating_point or dtype.is_complex:
                element.fill_(float("nan"))
            else:
                element.view(torch.uint8).fill_(_INTEGER_POISON)
            self._element = element
            shape = parameter.shape
            if parameter.numel():
                self.tensor = element.reshape(()).expand(shape)
            else:
                self.tensor = torch.empty(shape, dtype=dtype, device=device)
        self._bits = _bits_of(element) if device.type == "cpu" else None

    def install(self) -> None:
        """Make the parameter show the placeholder."""
        with torch.inference_mode(False):
            self._parameter.data = self.tensor

    def check(self) -> None:
        """Raises: PlaceholderOverwritten if the parameter's data was replaced, or written through the placeholder."""
        replaced = self._parameter.data_ptr() != self.tensor.data_ptr()
        written = self._bits is not None and _bits_of(self._element) != self._bits
        if replaced or written:
            raise PlaceholderOverwritten(
                f"the values of parameter {self.name!r} live in the engine, but its `.data` was "
                f"{'replaced' if replaced else 'written to'} while it was released, and the new values would be "
                f"lost; edit it inside `with engine.gather({self.name!r}, write=True) as parameters:`"
            )


def _bits_of(element: Tensor) -> bytes:
    return element.view(torch.uint8).numpy().tobytes()
