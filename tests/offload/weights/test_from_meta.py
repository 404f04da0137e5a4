"""A model on the meta device is initialised by its own modules, unit by unit, or refused by name."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from offload import AdamW, OffloadConfig, OffloadEngine

HOST = OffloadConfig(device="cpu", host_memory="64MiB")


def encoder() -> nn.Module:
    return nn.Sequential(
        nn.Embedding(50, 80, padding_idx=2),
        nn.TransformerEncoderLayer(80, 4, 160, batch_first=True),
        nn.Conv1d(80, 80, 1),
        nn.BatchNorm1d(80),
        nn.LSTM(80, 80),
        nn.Linear(80, 50),
    )


def test_torch_modules_get_the_bits_of_an_eager_build(kit: SimpleNamespace) -> None:
    torch.manual_seed(8)
    expected = encoder()
    after = torch.get_rng_state()
    with torch.device("meta"):
        model = encoder()
    torch.manual_seed(8)
    with OffloadEngine.from_meta(model, AdamW(lr=1e-2), HOST) as engine:
        assert torch.equal(torch.get_rng_state(), after)
        state = engine.state_dict()
    for name, value in expected.state_dict().items():
        assert kit.bits(value) == kit.bits(state[name]), name


def test_a_tied_weight_is_that_of_the_module_that_holds_it_first(kit: SimpleNamespace) -> None:
    """Registered last and tied after both were made, as models do it."""

    def build() -> nn.Module:
        model = nn.Sequential(nn.Embedding(50, 80), nn.Linear(80, 80), nn.Linear(80, 50, bias=False))
        model[2].weight = model[0].weight
        return model

    torch.manual_seed(8)
    expected = build()
    after = torch.get_rng_state()
    with torch.device("meta"):
        model = build()
    torch.manual_seed(8)
    with OffloadEngine.from_meta(model, AdamW(lr=1e-2), HOST) as engine:
        assert torch.equal(torch.get_rng_state(), after)
        assert dict.__getitem__(model[2]._parameters, "weight") is dict.__getitem__(model[0]._parameters, "weight")
        state = engine.state_dict()
    for name, value in expected.state_dict().items():
        assert kit.bits(value) == kit.bits(state[name]), name


def test_init_sets_what_modules_do_not(kit: SimpleNamespace) -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(80))
            self.register_buffer("table", torch.arange(80.0))

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(80, 80), Scale())

    with torch.device("meta"):
        model = build()
    with pytest.raises(ValueError, match=r"'1\.weight' is on the meta device.*2 parameters and buffers.*Scale has no"):
        OffloadEngine.from_meta(model, AdamW(lr=1e-2), HOST)
    with pytest.raises(ValueError, match=r"init\(\.\.\.\) on its Linear did not set it"):
        OffloadEngine.from_meta(model, AdamW(lr=1e-2), HOST, init=lambda part: None)
    assert model[0].weight.device.type == "meta"

    def init(part: nn.Module) -> None:
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=0.02)
            nn.init.zeros_(part.bias)
        if isinstance(part, Scale):
            nn.init.constant_(part.weight, 3.0)
            part.table.copy_(torch.arange(80.0))

    torch.manual_seed(2)
    with OffloadEngine.from_meta(model, AdamW(lr=1e-2), HOST, init=init) as engine:
        state = engine.state_dict()
    torch.manual_seed(2)
    expected = build().apply(init)
    torch.manual_seed(2)
    expected.apply(init)
    for name, value in expected.state_dict().items():
        assert kit.bits(value) == kit.bits(state[name]), name


def test_the_constructor_refuses_what_has_no_values(kit: SimpleNamespace) -> None:
    with torch.device("meta"):
        model = kit.TinyGPT(width=96)
        with_table = nn.Linear(80, 80)
        with_table.register_buffer("table", torch.zeros(80))
    with pytest.raises(ValueError, match=r"'tokens\.weight' is on the meta device.*from_meta"):
        OffloadEngine(model, AdamW(lr=1e-2), HOST)
    with pytest.raises(ValueError, match=r"buffer 'table' is on the meta device"):
        OffloadEngine(with_table, AdamW(lr=1e-2), HOST)
