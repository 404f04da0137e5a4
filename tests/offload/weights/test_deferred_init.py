"""A model built under `deferred_init` takes no memory and gets, unit by unit, the bits of an eager build."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from offload import SGD, AdamW, BudgetTooSmall, OffloadConfig, OffloadEngine, deferred_init
from offload.weights import draws, recorder
from offload.weights.recipe import recipe_of, values_of


class Odd(nn.Module):
    """What modules do when they are built, and more: views, copies, reads of values, casts, shapes that follow data."""

    def __init__(self) -> None:
        super().__init__()
        self.scaled = nn.Parameter(torch.randn(80, 100) * 0.02)
        self.joined = nn.Parameter(torch.cat([self.scaled.data[:40], self.scaled.data[:40] * 2]).T.contiguous())
        self.scaled.data[3].fill_(7)  # after it was read: `joined` keeps the row of before
        self.broadcast = nn.Parameter(torch.arange(1, 17).float().log()[None].expand(500, -1).contiguous())
        self.register_buffer("mask", torch.tril(torch.ones(128, 128)), persistent=False)
        if self.scaled.mean().item() > 0:
            self.branch = nn.Parameter(torch.zeros(3))
        self.through_numpy = nn.Parameter(torch.from_numpy(self.scaled.detach().numpy() * 2))
        self.coins = nn.Parameter(torch.empty_like(self.scaled).bernoulli_(0.3))
        self.dropped = nn.Parameter(nn.functional.dropout(self.scaled.data, 0.5))
        self.halved = nn.Parameter(self.scaled.data.to(torch.bfloat16))
        self.permuted = nn.Parameter(torch.randperm(9000).float())
        self.transposed = nn.Parameter(torch.empty(90, 100).t().normal_())
        self.scattered = nn.Parameter(torch.zeros(90, 100))
        self.scattered.data[torch.randint(90, (10,)), torch.randint(100, (10,))] = 1.5
        self.chosen = nn.Parameter(torch.rand(5000)[torch.rand(5000) > 0.5])
        self.where = nn.Parameter(torch.zeros(6000, device=self.scaled.device) + self.scaled.reshape(-1)[:6000])
        self.cast = nn.Linear(90, 90, dtype=torch.bfloat16).to(torch.float64)
        self.own_generator = nn.Parameter(torch.empty(100, 100).normal_(generator=torch.Generator().manual_seed(4)))


def in_bfloat16() -> nn.Module:
    torch.set_default_dtype(torch.bfloat16)
    try:
        return nn.Sequential(nn.Linear(200, 200), nn.LayerNorm(200), nn.Embedding(100, 100, padding_idx=3))
    finally:
        torch.set_default_dtype(torch.float32)


def with_every_initialiser() -> nn.Module:
    layers = nn.ModuleList(nn.Linear(100, 80) for _ in range(9))
    initialisers: list[Callable[..., Any]] = [
        nn.init.orthogonal_,
        lambda w: nn.init.sparse_(w, 0.1),
        nn.init.trunc_normal_,
        nn.init.eye_,
        nn.init.xavier_normal_,
        nn.init.xavier_uniform_,
        nn.init.kaiming_normal_,
        lambda w: nn.init.constant_(w, 0.3),
        lambda w: w.data.exponential_().clamp_(max=2.0).mul_(0.5),
    ]
    for layer, initialise in zip(layers, initialisers, strict=True):
        initialise(layer.weight)
    return layers


BUILDS: dict[str, Callable[[], nn.Module]] = {
    "odd": Odd,
    "bfloat16": in_bfloat16,
    "initialisers": with_every_initialiser,
    "encoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 3),
    "transformer": lambda: nn.Transformer(64, 4, 2, 2, 128, batch_first=True),
    "lstm": lambda: nn.LSTM(64, 64, 2),
    "conv": lambda: nn.Sequential(nn.Conv2d(32, 32, 3), nn.BatchNorm2d(32), nn.ConvTranspose2d(32, 32, 3)),
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(100, 100)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(100, 100)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(100, 100)),
}


@pytest.mark.parametrize("small_nbytes", [recorder._SMALL_NBYTES, 64])
@pytest.mark.parametrize("name", BUILDS)
def test_values_and_generator_are_those_of_an_eager_build(
    name: str, small_nbytes: int, kit: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with nearly nothing made at once (64 bytes), so that everything is recorded."""
    monkeypatch.setattr(recorder, "_SMALL_NBYTES", small_nbytes)
    torch.manual_seed(5)
    eager = BUILDS[name]()
    generator_after = torch.get_rng_state()
    torch.manual_seed(5)
    with deferred_init():
        deferred = BUILDS[name]()
    assert torch.equal(torch.get_rng_state(), generator_after)
    values = dict(deferred.named_parameters())
    assert values.keys() == dict(eager.named_parameters()).keys()
    for key, parameter in eager.named_parameters():
        made = values_of(values[key]) if recipe_of(values[key]) is not None else values[key]
        assert made.dtype == parameter.dtype and made.stride() == parameter.stride(), key
        assert kit.bits(made) == kit.bits(parameter), key
    for (key, buffer), (_, made) in zip(eager.named_buffers(), deferred.named_buffers(), strict=True):
        assert made.device.type == "cpu"
        assert kit.bits(made) == kit.bits(buffer), key
    assert any(recipe_of(parameter) is not None for parameter in values.values())
    assert torch.equal(torch.get_rng_state(), generator_after), (
        "making values draws nothing from the caller's generator"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("draw", ["normal_", "uniform_"])
def test_drawing_in_chunks_moves_the_generator_as_one_draw_does(
    draw: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draws, "_CHUNK_NUMEL", 64)
    func = getattr(torch.ops.aten, draw).default
    for numel in (1, 15, 16, 17, 64, 79, 80, 81, 1000, 1037):
        torch.manual_seed(numel)
        func(torch.empty(numel, dtype=dtype), 0.5, 2.0)
        expected = torch.get_rng_state()
        torch.manual_seed(numel)
        draws.draw(func, (numel,), dtype, (0.5, 2.0), {})
        assert torch.equal(torch.get_rng_state(), expected), numel


def test_trained_bits_are_those_of_an_eager_build(kit: SimpleNamespace, settings: dict[str, Any]) -> None:
    """Tied weights, a frozen block and dropout, on three placements that share no code path for bytes."""

    def build() -> nn.Module:
        return kit.TinyGPT(width=96, depth=3, dropout=0.1, frozen=True)

    with deferred_init():
        deferred = build()
    assert recipe_of(deferred.blocks[1].up.weight) is not None
    config = OffloadConfig(**settings)
    one = kit.engine_run(deferred, AdamW(lr=1e-2), config, kit.batches(3))
    other = kit.engine_run(build(), AdamW(lr=1e-2), config, kit.batches(3))
    kit.assert_same_run(one, other)


def test_parameters_stay_the_same_objects(kit: SimpleNamespace) -> None:
    with deferred_init():
        model = kit.TinyGPT(width=96)
    model.head.weight.marked = "mine"
    known = dict(model.named_parameters(remove_duplicate=False))
    with OffloadEngine(model, AdamW(lr=1e-2), OffloadConfig(device="cpu", host_memory="64MiB")):
        assert all(known[name] is p for name, p in model.named_parameters(remove_duplicate=False))
        assert model.tokens.weight.marked == "mine"


def test_failed_construction_leaves_a_deferred_model_that_works(kit: SimpleNamespace) -> None:
    """First a budget that is refused before anything is filled, then a source that fails at the third unit."""
    torch.manual_seed(1)
    with deferred_init():
        model = kit.TinyGPT(width=96)
    torch.manual_seed(1)
    expected = kit.TinyGPT(width=96).state_dict()
    with pytest.raises(BudgetTooSmall):
        OffloadEngine(model, AdamW(lr=1e-2), OffloadConfig(device="cpu", host_memory=4096))
    assert model.blocks[0].up.weight.device.type == "meta"
    last = model.blocks[1].down.weight
    recipe = recipe_of(last)
    assert recipe is not None
    kept, recipe.steps[:] = list(recipe.steps), [SimpleNamespace(index=0, reads=(), overwrites=True)]  # type: ignore[list-item]
    config = OffloadConfig(device="cpu", host_memory="64MiB")
    with pytest.raises(AttributeError):
        OffloadEngine(model, AdamW(lr=1e-2), config)
    recipe.steps[:] = kept
    assert {p.device.type for p in model.parameters() if p.numel() > 4096} == {"meta"}
    with OffloadEngine(model, AdamW(lr=1e-2), config) as engine:
        state = engine.state_dict()
    for name, value in expected.items():
        assert kit.bits(state[name]) == kit.bits(value), name


def test_recurrent_modules_keep_their_weak_references(kit: SimpleNamespace) -> None:
    torch.manual_seed(1)
    with deferred_init():
        model = nn.LSTM(64, 64)
    torch.manual_seed(1)
    expected = nn.LSTM(64, 64)
    config = OffloadConfig(device="cpu", host_memory="64MiB", dtype=torch.float32)
    with OffloadEngine(model, AdamW(lr=1e-2), config) as engine:
        result = engine(torch.ones(3, 2, 64))[0]
    assert kit.bits(result) == kit.bits(expected(torch.ones(3, 2, 64))[0])


def test_a_parameter_that_nothing_sets_is_zero_and_said() -> None:
    with deferred_init():
        model = nn.Sequential(nn.Linear(100, 100))
        model[0].extra = nn.Parameter(torch.empty(100, 100))
    config = OffloadConfig(device="cpu", host_memory="64MiB")
    with pytest.warns(UserWarning, match=r"left without values.*\[0\.extra\].*zeros"):
        engine = OffloadEngine(model, AdamW(lr=1e-2), config)
    with engine:
        assert not engine.state_dict()["0.extra"].any()


def test_unseeded_build_draws_nothing_until_it_is_filled() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with deferred_init(seeded=False):
        model = nn.Linear(100, 100, bias=False)
    assert torch.equal(torch.get_rng_state(), before)
    value = values_of(model.weight)
    torch.manual_seed(3)
    assert torch.equal(value, nn.Linear(100, 100, bias=False).weight)


def test_a_change_outside_is_refused_by_name() -> None:
    with deferred_init():
        model = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 100))
    model[1].to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"'1\.weight' is on the meta device.*deferred_init"):
        OffloadEngine(model, AdamW(lr=1e-2), OffloadConfig(device="cpu", host_memory="64MiB"))


def test_parameters_over_one_memory_are_refused() -> None:
    with deferred_init():
        model = nn.Linear(100, 100)
        model.other = nn.Parameter(model.weight.data[:50])
    with pytest.raises(ValueError, match="'weight' and 'other' are different objects over the same memory"):
        OffloadEngine(model, AdamW(lr=1e-2), OffloadConfig(device="cpu", host_memory="64MiB"))


def test_a_large_tensor_that_went_in_may_not_change() -> None:
    table = torch.randn(600, 600)
    with deferred_init():
        model = nn.Linear(600, 600)
        model.weight.data.copy_(table)
    assert torch.equal(values_of(model.weight), table)
    table.zero_()
    with pytest.raises(RuntimeError, match="has been changed since"):
        values_of(model.weight)


def test_a_small_tensor_that_went_in_is_kept() -> None:
    table = torch.randn(100, 100)
    with deferred_init():
        model = nn.Linear(100, 100)
        model.weight.data.copy_(table)
    expected = table.clone()
    table.zero_()
    assert torch.equal(values_of(model.weight), expected)


def test_plain_tensor_attributes_are_made_for_the_engine() -> None:
    class Tables(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.outer(torch.arange(100.0), torch.arange(100.0)).cos()
            self.linear = nn.Linear(100, 100)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x + self.table[: len(x)])

    with deferred_init():
        model = Tables()
    with OffloadEngine(
        model, AdamW(lr=1e-2), OffloadConfig(device="cpu", host_memory="64MiB", dtype=torch.float32)
    ) as engine:
        assert torch.equal(model.table, torch.outer(torch.arange(100.0), torch.arange(100.0)).cos())
        engine.backward(engine(torch.ones(4, 100)).square().mean())
        engine.step()


def test_resumed_run_takes_its_values_from_the_store(kit: SimpleNamespace, tmp_path: Path) -> None:
    """A deferred model with another seed: nothing of its own values may come through."""
    settings = {"device": "cpu", "nvme": tmp_path, "host_memory": "64MiB"}
    with OffloadEngine(kit.TinyGPT(width=96, seed=1), AdamW(lr=1e-2), OffloadConfig(**settings)) as engine:
        expected = engine.state_dict()
    with deferred_init():
        model = kit.TinyGPT(width=96, seed=2)
    with OffloadEngine(model, AdamW(lr=1e-2), OffloadConfig(resume=True, **settings)) as engine:
        state = engine.state_dict()
    assert all(kit.bits(state[name]) == kit.bits(expected[name]) for name in expected)


@pytest.mark.parametrize("change", ["load_state_dict", "init", "mul_"])
def test_a_change_in_place_after_the_block_is_refused(change: str) -> None:
    with deferred_init():
        model = nn.Sequential(nn.Linear(128, 128))
    with torch.no_grad():
        if change == "load_state_dict":
            with pytest.warns(UserWarning):
                model.load_state_dict(nn.Sequential(nn.Linear(128, 128)).state_dict())
        elif change == "init":
            nn.init.zeros_(model[0].weight)
        else:
            model[0].weight.mul_(2)
    with pytest.raises(ValueError, match=r"'0.weight' was changed after .* had ended"):
        OffloadEngine(model, SGD(), OffloadConfig(device="cpu", host_memory="64MiB"))


def test_a_second_block_may_change_what_the_first_has_built() -> None:
    torch.manual_seed(0)
    eager = nn.Sequential(nn.Linear(128, 128))
    with torch.no_grad():
        eager[0].weight.mul_(2)
    torch.manual_seed(0)
    with deferred_init():
        model = nn.Sequential(nn.Linear(128, 128))
    with deferred_init(), torch.no_grad():
        model[0].weight.mul_(2)
    config = OffloadConfig(device="cpu", host_memory="64MiB", dtype=torch.float32)
    with OffloadEngine(model, SGD(), config) as engine:
        assert torch.equal(engine.state_dict()["0.weight"], eager[0].weight)
