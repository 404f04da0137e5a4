"""Models whose compute takes a given time, so that a schedule can be judged on any machine.

Shapes in this file: B rows, N width.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn


class Pacer:
    """Lets time pass up to a promised end. What a sleep ran over is taken off the next, so that sums are kept."""

    def __init__(self) -> None:
        self._owed_s = 0.0

    def begin(self, seconds: float) -> float:
        """When work that begins now and takes `seconds` is to end, on the clock of `time.perf_counter`."""
        return time.perf_counter() + seconds - self._owed_s

    def end(self, end_s: float) -> None:
        """Sleep until `end_s`; work that took longer by itself is noted in the same way."""
        rest_s = end_s - time.perf_counter()
        if rest_s > 0:
            time.sleep(rest_s)
        self._owed_s = max(0.0, time.perf_counter() - end_s)


class _Layer(torch.autograd.Function):
    """x + x W^T with its true gradients, each direction taking the layer's time."""

    @staticmethod
    def forward(ctx: Any, x_BN: Tensor, weight_NN: Tensor, layer: PacedLayer) -> Tensor:
        end_s = layer.pacer.begin(layer.forward_s)
        ctx.layer = layer
        ctx.save_for_backward(x_BN, weight_NN)
        out_BN = x_BN + x_BN @ weight_NN.t()
        layer.pacer.end(end_s)
        return out_BN

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad_BN,) = gradients
        layer: PacedLayer = ctx.layer
        end_s = layer.pacer.begin(layer.backward_s)
        x_BN, weight_NN = ctx.saved_tensors
        grad_x_BN = grad_BN + grad_BN @ weight_NN
        grad_weight_NN = grad_BN.t() @ x_BN
        layer.pacer.end(end_s)
        return grad_x_BN, grad_weight_NN, None


class PacedLayer(nn.Module):
    """A residual linear map, [B, N] -> [B, N], whose time is given and not computed.

    Args:
        width: N; the layer has N * N parameters.
        forward_s, backward_s: seconds of a forward and of a backward (without the forward that recomputes).
        pacer: shared by the layers that compute one after another.
    """

    def __init__(self, width: int, forward_s: float, backward_s: float, pacer: Pacer) -> None:
        super().__init__()
        self.forward_s = forward_s
        self.backward_s = backward_s
        self.pacer = pacer
        self.weight = nn.Parameter(torch.randn(width, width) * (0.1 / width))

    def forward(self, x_BN: Tensor) -> Tensor:
        return _Layer.apply(x_BN, self.weight, self)


class PacedStack(nn.Module):
    """`num_layers` paced layers, each a unit of its own; returns the mean square of what comes out, an fp32 scalar."""

    def __init__(self, num_layers: int, width: int, forward_s: float, backward_s: float) -> None:
        super().__init__()
        pacer = Pacer()
        self.layers = nn.ModuleList(PacedLayer(width, forward_s, backward_s, pacer) for _ in range(num_layers))

    def forward(self, x_BN: Tensor) -> Tensor:
        for layer in self.layers:
            x_BN = layer(x_BN)
        return x_BN.float().square().mean()


class ProductStack(nn.Module):
    """`num_layers` residual linear maps of true matrix products; as `PacedStack` in every other way."""

    def __init__(self, num_layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(num_layers))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.1 / width)

    def forward(self, x_BN: Tensor) -> Tensor:
        for layer in self.layers:
            x_BN = x_BN + layer(x_BN)
        return x_BN.float().square().mean()
