"""The loop without an engine, written as well as plain torch allows: what the engine's speed is compared with."""

import time

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .models.gpt import GPT


class PlainTrainer:
    """Mixed-precision training with everything in device memory.

    Working weights in `dtype`; for bfloat16 an fp32 master and fp32 moments per parameter, updated by torch's fused
    AdamW, 16-bit gradients upcast one parameter at a time so that both copies never exist for all of them. For float32
    the working weights are the masters. Nothing is recomputed unless asked: this is the fast side of the comparison.
    `compute_s` has the seconds of the last step's forward and of its backward.
    """

    def __init__(
        self, model: GPT, *, lr: float, weight_decay: float, dtype: torch.dtype, device: str, recompute: bool = False
    ) -> None:
        masters = [parameter.detach().to(device, torch.float32, copy=True) for parameter in model.parameters()]
        self.model = model.to(device)
        for parameter in model.parameters():  # the module's .to(dtype) would cast its fp32 buffers too
            parameter.data = parameter.data.to(dtype)
        self.working = list(model.parameters())
        self.compute_s = (0.0, 0.0)
        self.split = dtype != torch.float32
        self.masters = masters if self.split else self.working
        self.optimizer = torch.optim.AdamW(self.masters, lr=lr, weight_decay=weight_decay, fused=True)
        if recompute:
            model.blocks = nn.ModuleList(_Recomputed(block) for block in model.blocks)

    def step(self, ids: Tensor, targets: Tensor) -> float:
        """One forward, backward and update of int64 [B, T] bytes; returns the loss in nats per byte."""
        began_s = _now_s()
        loss = self.model(ids, targets)
        middle_s = _now_s()
        loss.backward()
        self.compute_s = (middle_s - began_s, _now_s() - middle_s)
        if self.split:
            for master, working in zip(self.masters, self.working, strict=True):
                master.grad = None if working.grad is None else working.grad.float()
                working.grad = None
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.split:
            with torch.no_grad():
                for master, working in zip(self.masters, self.working, strict=True):
                    working.copy_(master)
        return loss.item()


def _now_s() -> float:
    """The clock when everything launched so far has run."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


class _Recomputed(nn.Module):
    """A block whose activations are computed again in backward, as the engine does."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *inputs: Tensor) -> Tensor:
        return checkpoint(self.block, *inputs, use_reentrant=False)
