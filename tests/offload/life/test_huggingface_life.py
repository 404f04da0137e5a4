"""Hugging Face objects under the engine: generation, saving, checkpointing, peft."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from offload import AdamW, OffloadConfig, OffloadEngine

transformers = pytest.importorskip("transformers")


def llama(tied: bool = False) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


TOKENS = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(1))
FP32 = {"dtype": torch.float32}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 1.3},
    "beams": {"do_sample": False, "num_beams": 2},
    "no cache": {"do_sample": False, "use_cache": False},
}


def train(call: Any, optimizer: Any, num_steps: int, **more: Any) -> list[float]:
    losses = []
    for _ in range(num_steps):
        loss = call(input_ids=TOKENS, labels=TOKENS, **more).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("way", WAYS)
def test_generated_tokens_are_those_of_the_plain_model(
    kit: SimpleNamespace, settings: dict[str, Any], way: str, tied: bool
) -> None:
    """Before, between and after steps."""
    plain, model = llama(tied), llama(tied)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    with OffloadEngine(model, AdamW(lr=1e-2), OffloadConfig(**FP32, **settings)) as engine:
        for _ in range(2):
            made = []
            for one in (plain, model):
                torch.manual_seed(3)
                made.append(one.generate(TOKENS, max_new_tokens=6, min_new_tokens=6, **WAYS[way]))
            assert torch.equal(*made)
            assert engine.memory.private_nbytes == 0, "a copy that generation read is not left behind"
            train(plain, optimizer, 1)
            train(engine, engine.optimizer, 1)


def test_a_direct_call_is_a_pass_of_the_engine(settings: dict[str, Any]) -> None:
    """`model(...)` and `model.model(...)` begin one as `engine(...)` does: order, record, closed engine."""
    plain, model = llama(), llama()
    engine = OffloadEngine(model, AdamW(lr=1e-2), OffloadConfig(**FP32, **settings))
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    layer = model.model.layers[0]
    assert inspect.signature(layer.forward) == inspect.signature(plain.model.layers[0].forward)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    with engine:
        theirs = train(plain, optimizer, 3)
        ours = train(model, engine.optimizer, 3)
        assert ours == pytest.approx(theirs, rel=1e-5)
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        engine.step()
        optimizer.zero_grad()
        plain(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        with torch.no_grad():
            torch.testing.assert_close(
                model.model(TOKENS).last_hidden_state, plain.model(TOKENS).last_hidden_state, rtol=1e-4, atol=1e-5
            )
    with pytest.raises(RuntimeError, match=r"the engine is closed"):
        model(input_ids=TOKENS)


def test_save_pretrained_of_the_model_writes_real_values(
    kit: SimpleNamespace, settings: dict[str, Any], tmp_path: Path
) -> None:
    plain, model = llama(True), llama(True)
    with OffloadEngine(model, AdamW(), OffloadConfig(**FP32, **settings)) as engine:
        model.save_pretrained(tmp_path / "saved")
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        for name, value in plain.state_dict().items():
            assert kit.bits(again.state_dict()[name]) == kit.bits(value), name
        wrapped = OffloadEngine(again, AdamW(), OffloadConfig(device="cpu", **FP32))
        assert wrapped.module.config.vocab_size == 61
        wrapped.close()
        train(engine, engine.optimizer, 1)


@pytest.mark.parametrize("name", ["resize_token_embeddings", "add_adapter"])
def test_changes_of_the_architecture_are_refused(name: str) -> None:
    model = llama()
    with OffloadEngine(model, AdamW(), OffloadConfig(device="cpu", **FP32)) as engine:
        if name == "add_adapter":
            peft = pytest.importorskip("peft")
            with pytest.raises(RuntimeError, match=r"has parameters that the engine has no home"):
                peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj"]), model)
        else:
            with pytest.raises(RuntimeError, match=r"resize_token_embeddings\(\) on the wrapped .* is refused"):
                model.resize_token_embeddings(70)
            assert model.config.vocab_size == 61 and model.get_input_embeddings().num_embeddings == 61
            train(engine, engine.optimizer, 1)


def test_gradient_checkpointing_of_the_model(settings: dict[str, Any]) -> None:
    plain, model = llama(), llama()
    for one in (plain, model):
        one.gradient_checkpointing_enable({"use_reentrant": False})
        one.train()
    with OffloadEngine(model, AdamW(lr=1e-2), OffloadConfig(**FP32, **settings)) as engine:
        theirs = train(plain, torch.optim.AdamW(plain.parameters(), lr=1e-2), 3, use_cache=False)
        assert train(engine, engine.optimizer, 3, use_cache=False) == pytest.approx(theirs, rel=1e-5)


# -- peft


def with_lora() -> Any:
    peft = pytest.importorskip("peft")
    model = llama()
    torch.manual_seed(5)
    return peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    )


def adapters(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def test_lora_trains_generates_and_saves_as_plain_peft(
    kit: SimpleNamespace, settings: dict[str, Any], tmp_path: Path
) -> None:
    plain, model = with_lora(), with_lora()
    with OffloadEngine(model, AdamW(lr=1e-2), OffloadConfig(**FP32, **settings)) as engine:
        theirs = train(plain, torch.optim.AdamW(adapters(plain), lr=1e-2), 4)
        assert train(engine, engine.optimizer, 4) == pytest.approx(theirs, rel=1e-5)
        found = engine.state_dict()
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)
            if "lora_" not in name:
                assert kit.bits(found[name]) == kit.bits(value), name
        assert torch.equal(
            model.generate(input_ids=TOKENS, max_new_tokens=5, do_sample=False),
            plain.generate(input_ids=TOKENS, max_new_tokens=5, do_sample=False),
        )
        with torch.no_grad(), model.disable_adapter():
            off = engine(input_ids=TOKENS).logits
        with torch.no_grad(), plain.disable_adapter():
            torch.testing.assert_close(off, plain(input_ids=TOKENS).logits, rtol=1e-5, atol=1e-6)
        assert train(engine, engine.optimizer, 1)[0] < theirs[0], "adapters go on after they were switched off"
        model.save_pretrained(tmp_path)
        for name, value in load_file(tmp_path / "adapter_model.safetensors").items():
            key = name.replace("lora_A.weight", "lora_A.default.weight").replace(
                "lora_B.weight", "lora_B.default.weight"
            )
            assert kit.bits(value) == kit.bits(engine.state_dict()[key]), name


@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
def test_merging_into_a_streamed_base_is_refused(method: str) -> None:
    model = with_lora()
    with OffloadEngine(model, AdamW(), OffloadConfig(device="cpu", **FP32)) as engine:
        with pytest.raises(RuntimeError, match=rf"{method}\(\) on the wrapped .* is refused; .*engine.state_dict\(\)"):
            getattr(model, method)()
        train(engine, engine.optimizer, 1)


def test_a_second_adapter_needs_reserved_states(settings: dict[str, Any]) -> None:
    """Only one adapter is trainable at a time in peft; switching unfreezes what started frozen."""
    peft = pytest.importorskip("peft")

    def two() -> Any:
        model = with_lora()
        torch.manual_seed(6)
        model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
        model.set_adapter("default")
        return model

    def run(call: Any, model: Any, optimizer: Any) -> list[float]:
        losses = train(call, optimizer, 2)
        model.set_adapter("other")
        losses += train(call, optimizer, 2)
        model.set_adapter("default")
        return losses + train(call, optimizer, 2)

    plain = two()
    everything = [p for name, p in plain.named_parameters() if "lora_" in name]
    theirs = run(plain, plain, torch.optim.AdamW(everything, lr=1e-2))
    model = two()
    config = OffloadConfig(**FP32, **settings, trainable=["*lora_*"])
    with OffloadEngine(model, AdamW(lr=1e-2), config) as engine:
        assert run(engine, model, engine.optimizer) == pytest.approx(theirs, rel=1e-5)
    model = two()
    with OffloadEngine(model, AdamW(lr=1e-2), OffloadConfig(device="cpu", **FP32)) as engine:
        model.set_adapter("other")
        with pytest.raises(RuntimeError, match=r"lora_A\.other\.weight' was frozen when the engine was built"):
            engine(input_ids=TOKENS)
