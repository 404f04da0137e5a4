"""Hugging Face models: built without memory, loaded from a folder, saved so that transformers reads the same bits."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from offload import AdamW, OffloadConfig, OffloadEngine, deferred_init
from offload.weights.recipe import recipe_of, values_of

transformers: Any = pytest.importorskip("transformers", reason="NOT RUN: transformers is not installed")

HOST = OffloadConfig(device="cpu", host_memory="64MiB")
SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
BUILDS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
    "tied": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(tie_word_embeddings=True, **SIZES)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=256, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    ),
    "mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(num_local_experts=4, **SIZES)),
    "mamba": lambda: transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=256, hidden_size=64, num_hidden_layers=2)
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=256, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    ),
}


@pytest.mark.parametrize("name", BUILDS)
def test_deferred_build_has_the_bits_of_an_eager_one(name: str, kit: SimpleNamespace) -> None:
    torch.manual_seed(5)
    eager = BUILDS[name]()
    after = torch.get_rng_state()
    torch.manual_seed(5)
    with deferred_init():
        deferred = BUILDS[name]()
    assert torch.equal(torch.get_rng_state(), after)
    values = dict(deferred.named_parameters())
    for key, parameter in eager.named_parameters():
        made = values_of(values[key]) if recipe_of(values[key]) is not None else values[key]
        assert kit.bits(made) == kit.bits(parameter), key
    for (key, buffer), (_, made) in zip(eager.named_buffers(), deferred.named_buffers(), strict=True):
        assert kit.bits(made) == kit.bits(buffer), key


@pytest.mark.parametrize("name", ["llama", "tied", "gpt2", "mixtral", "t5"])
def test_a_folder_of_ours_is_read_by_transformers(name: str, kit: SimpleNamespace, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = BUILDS[name]()
    with OffloadEngine(model, AdamW(lr=1e-2), HOST) as engine:
        engine.save_pretrained(tmp_path / "out", max_shard_size="100KB")
        state = engine.state_dict()
    found = type(model).from_pretrained(tmp_path / "out")
    assert found.config.architectures == [type(model).__name__]
    assert found.dtype == torch.float32
    for key, value in found.state_dict().items():
        assert kit.bits(value) == kit.bits(state[key]), key


@pytest.mark.parametrize("name", ["llama", "tied", "gpt2"])
def test_a_folder_of_transformers_is_read_without_a_module(name: str, kit: SimpleNamespace, tmp_path: Path) -> None:
    """The first losses are those of the eager model too, so buffers that no file holds (rotary tables) are right."""
    torch.manual_seed(1)
    model = BUILDS[name]().train()
    model.generation_config.temperature = 0.25
    model.generation_config.do_sample = True
    model.to(torch.bfloat16).save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    config = OffloadConfig(device="cpu", host_memory="64MiB", dtype=torch.float32)
    tokens = torch.randint(256, (2, 16))
    with OffloadEngine.from_pretrained(tmp_path / "theirs", AdamW(lr=1e-2), config) as engine:
        assert type(engine.module) is type(model)
        state = engine.state_dict()
        torch.manual_seed(2)
        loss = engine(tokens, labels=tokens).loss
        engine.save_pretrained(tmp_path / "ours")
    for key, value in model.state_dict().items():
        assert kit.bits(value.float()) == kit.bits(state[key]), key
    torch.manual_seed(2)
    expected = type(model).from_pretrained(tmp_path / "theirs", dtype=torch.float32).train()
    assert loss.item() == expected(tokens, labels=tokens).loss.item()
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "ours").temperature == 0.25


def test_lora_inside_a_deferred_build_trains_as_an_eager_one(kit: SimpleNamespace) -> None:
    peft = pytest.importorskip("peft", reason="NOT RUN: peft is not installed")

    def build() -> nn.Module:
        torch.manual_seed(4)
        lora = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"])
        return peft.get_peft_model(BUILDS["llama"](), lora)

    def losses(model: nn.Module) -> list[float]:
        found = []
        with OffloadEngine(model, AdamW(lr=1e-2), HOST) as engine:
            for step in range(3):
                torch.manual_seed(step)
                tokens = torch.randint(256, (2, 16))
                loss = engine(input_ids=tokens, labels=tokens).loss
                engine.backward(loss)
                engine.step()
                found.append(float(loss))
        return found

    with deferred_init():
        deferred = build()
    assert losses(deferred) == losses(build())


def test_an_unknown_class_and_no_configuration_are_said(kit: SimpleNamespace, tmp_path: Path) -> None:
    with OffloadEngine(BUILDS["llama"](), AdamW(lr=1e-2), HOST) as engine:
        engine.save_pretrained(tmp_path / "out")
    text = (tmp_path / "out" / "config.json").read_text()
    (tmp_path / "out" / "config.json").write_text(text.replace("LlamaForCausalLM", "NoSuchModel"))
    with pytest.raises(ValueError, match=r"NoSuchModel.*deferred_init\(seeded=False\)"):
        OffloadEngine.from_pretrained(tmp_path / "out", AdamW(lr=1e-2), HOST)
    (tmp_path / "out" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"no config\.json"):
        OffloadEngine.from_pretrained(tmp_path / "out", AdamW(lr=1e-2), HOST)


def test_missing_transformers_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with OffloadEngine(BUILDS["llama"](), AdamW(lr=1e-2), HOST) as engine:
        engine.save_pretrained(tmp_path / "out")
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ImportError, match="needs transformers"):
        OffloadEngine.from_pretrained(tmp_path / "out", AdamW(lr=1e-2), HOST)


def test_from_meta_is_the_models_own_initialisation(kit: SimpleNamespace) -> None:
    """What `init_weights()` gives under the seed; an eager build draws more before it, in torch's constructors."""
    with torch.device("meta"):
        model = BUILDS["tied"]()
    torch.manual_seed(6)
    with OffloadEngine.from_meta(model, AdamW(lr=1e-2), HOST) as engine:
        state = engine.state_dict()
        tokens = torch.randint(256, (2, 16))
        assert torch.isfinite(engine(tokens, labels=tokens).loss)
    with importlib.import_module("transformers.initialization").no_init_weights():
        expected = BUILDS["tied"]()
    torch.manual_seed(6)
    expected.init_weights()
    for key, value in expected.state_dict().items():
        assert kit.bits(value) == kit.bits(state[key]), key
    for (key, buffer), (_, made) in zip(expected.named_buffers(), model.named_buffers(), strict=True):
        assert kit.bits(made) == kit.bits(buffer), key
