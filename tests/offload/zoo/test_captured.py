"""What Hugging Face's hooks collect inside of units: attentions, hidden states, router logits."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from .models import masked, tokens


@pytest.mark.parametrize("activation_memory", [0, "1MiB"], ids=["recomputed", "kept"])
def test_outputs_that_hooks_of_transformers_collect(
    kit: SimpleNamespace, settings: dict[str, Any], activation_memory: Any
) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return masked("bert", attn_implementation="eager")

    def loss_of(call: Callable[..., Any], module: nn.Module, step: int) -> Tensor:
        ids = tokens(step)
        outputs = call(input_ids=ids, labels=ids, output_attentions=True, output_hidden_states=True)
        assert len(outputs.attentions) == 3 and len(outputs.hidden_states) == 4
        entropy = torch.stack([a.square().mean() for a in outputs.attentions]).sum()
        return outputs.loss + entropy

    kit.train_both(make, loss_of, {**settings, "activation_memory": activation_memory})
