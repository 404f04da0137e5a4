"""Saving and going on: the folders are the plain Trainer's, and a run that goes on is the run that never stopped."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")
from offload import AdamW, CheckpointDamaged, CheckpointMismatch, OffloadConfig, OffloadEngine  # noqa: E402
from offload.integrations.trainer_checkpoint import (  # noqa: E402
    _generators_kept,
    load_state,
    load_weights,
    save_state,
)

Make = Callable[..., Any]


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def everything(engine: Any) -> dict[str, torch.Tensor]:
    """Masters, moments and counts."""
    with engine.gather("*") as parameters:
        found = {}
        for name, host in parameters.items():
            found[name] = host.value
            found.update({f"{name}/{state}": value for state, value in host.states.items()})
            found[f"{name}/step"] = torch.tensor(host.step)
    return found


@pytest.mark.parametrize(
    ("bf16", "accumulation", "stop"),
    [(False, 4, 2), (False, 1, 11), (True, 4, 4)],
    ids=["mid-epoch", "end of epoch", "bf16"],
)
def test_resume_is_the_run_that_never_stopped(
    bf16: bool,
    accumulation: int,
    stop: int,
    kit: SimpleNamespace,
    on_nvme: Make,
    over_engine: Make,
    tmp_path: Path,
) -> None:
    """With dropout, clipping, shuffling and a schedule, under another placement, from a model of other values."""
    args = {
        "gradient_accumulation_steps": accumulation,
        "save_strategy": "steps",
        "save_steps": stop,
        "bf16": bf16,
    }
    whole = over_engine(kit.gpt2(), kit.arguments(tmp_path / "a", **args), train_dataset=kit.rows(), offload=on_nvme())
    whole.train()
    resumed = over_engine(
        kit.gpt2(seed=1),
        kit.arguments(tmp_path / "b", **args),
        train_dataset=kit.rows(),
        offload={"host_memory": "64MiB"},
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{stop}"))
    for key in ("loss", "grad_norm", "learning_rate", "epoch"):
        assert kit.logged(resumed, key)[:-1] == kit.logged(whole, key)[:-1]  # the last entry sums this call up
    assert resumed.state.global_step == whole.state.global_step > stop
    assert same_bits(everything(resumed.engine), everything(whole.engine))


def test_loading_leaves_the_generators_to_the_trainer(kit: SimpleNamespace, on_nvme: Make, tmp_path: Path) -> None:
    """It sets them once it has found its place in the data; until then they are those of a run that begins."""
    with OffloadEngine(kit.llama(), AdamW(), OffloadConfig(dtype=torch.float32, **on_nvme())) as engine:
        save_state(engine, tmp_path, frozen=True)
        expected = []
        for load in (False, True):
            torch.manual_seed(5), random.seed(5), np.random.seed(5)  # noqa: NPY002
            if load:
                load_state(engine, tmp_path)
            expected.append((torch.rand(()).item(), random.random(), np.random.rand()))  # noqa: NPY002
        assert expected[0] == expected[1]


def test_a_load_that_fails_leaves_the_generators_too() -> None:
    expected = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    with pytest.raises(KeyError), _generators_kept():
        random.random(), np.random.rand()  # noqa: NPY002
        raise KeyError
    assert (random.getstate(), np.random.get_state()[1].tolist()) == expected  # noqa: NPY002


def test_weights_are_closed_again(kit: SimpleNamespace, tmp_path: Path) -> None:
    with OffloadEngine(kit.llama(), AdamW(), OffloadConfig(dtype=torch.float32, device="cpu")) as engine:
        engine.save_pretrained(tmp_path, max_shard_size="20KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 2
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(5):
            load_weights(engine, tmp_path)
        assert len(os.listdir("/proc/self/fd")) == before
        last = max(tmp_path.glob("*.safetensors"))
        last.write_bytes(last.read_bytes()[:-1])
        with pytest.raises(ValueError, match=last.name):
            load_weights(engine, tmp_path)
        assert len(os.listdir("/proc/self/fd")) == before


def test_folders_are_those_of_the_plain_trainer_and_can_be_loaded(
    kit: SimpleNamespace, on_nvme: Make, over_engine: Make, tmp_path: Path
) -> None:
    args = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
    plain = transformers.Trainer(kit.gpt2(), kit.arguments(tmp_path / "plain", **args), train_dataset=kit.rows())
    plain.train()
    plain.save_model()
    over = over_engine(
        kit.gpt2(), kit.arguments(tmp_path / "over", bf16=True, **args), train_dataset=kit.rows(), offload=on_nvme()
    )
    over.train()
    over.save_model()
    for folder in ("checkpoint-4", "checkpoint-6", "."):
        there = set(os.listdir(tmp_path / "plain" / folder))
        swapped = {"engine" if name == "optimizer.pt" else name for name in there}
        assert set(os.listdir(tmp_path / "over" / folder)) == swapped
    for folder in ("checkpoint-6", "."):
        loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "over" / folder)
        assert loaded.dtype is torch.float32  # as the model came, though it computes in bf16
        assert same_bits(loaded.state_dict(), over.engine.state_dict())
    over.model.save_pretrained(tmp_path / "by hand")
    assert same_bits(
        transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "by hand").state_dict(), over.engine.state_dict()
    )


def test_a_plain_run_goes_on_over_an_engine(
    kit: SimpleNamespace, on_nvme: Make, over_engine: Make, tmp_path: Path
) -> None:
    args = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    plain = transformers.Trainer(kit.llama(), kit.arguments(tmp_path, **args), train_dataset=kit.rows())
    plain.train()
    over = over_engine(
        kit.llama(seed=1), kit.arguments(tmp_path / "over", **args), train_dataset=kit.rows(), offload=on_nvme()
    )
    over.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert kit.logged(over, "loss") == pytest.approx(kit.logged(plain, "loss"), rel=2e-6)
    assert kit.logged(over, "learning_rate") == kit.logged(plain, "learning_rate")
    ours = over.engine.state_dict()
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=2e-6)


def test_the_best_model_is_loaded_at_the_end(
    kit: SimpleNamespace, on_nvme: Make, over_engine: Make, tmp_path: Path
) -> None:
    """A learning rate at which the loss goes up after the first evaluation, so that the best is not the last."""
    args = {
        "max_steps": 6,
        "learning_rate": 0.3,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 1,
        "load_best_model_at_end": True,
    }
    over = over_engine(
        kit.llama(),
        kit.arguments(tmp_path, **args),
        train_dataset=kit.rows(),
        eval_dataset=kit.rows(5, seed=4),
        offload=on_nvme(),
    )
    over.train()
    assert over.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2"]
    assert over.evaluate()["eval_loss"] == over.state.best_metric == min(kit.logged(over, "eval_loss"))
    best = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert same_bits(best.state_dict(), over.engine.state_dict())


def with_adapter(kit: SimpleNamespace, seed: int = 0) -> Any:
    peft = pytest.importorskip("peft", reason="ADAPTER TESTS NOT RUN: peft is missing; pip install peft")
    base = kit.llama()
    torch.manual_seed(seed)
    return peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_an_adapter_alone_is_saved_and_goes_on(
    kit: SimpleNamespace, on_nvme: Make, over_engine: Make, tmp_path: Path
) -> None:
    args = {
        "max_steps": 6,
        "learning_rate": 0.5,
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
    }
    data = {"train_dataset": kit.rows(), "eval_dataset": kit.rows(5, seed=4)}
    plain = transformers.Trainer(with_adapter(kit), kit.arguments(tmp_path / "plain", **args), **data)
    plain.train()
    whole = over_engine(with_adapter(kit), kit.arguments(tmp_path / "a", **args), offload=on_nvme(), **data)
    whole.train()
    assert kit.logged(whole, "loss") == pytest.approx(kit.logged(plain, "loss"), rel=1e-5)
    checkpoint = tmp_path / "a" / "checkpoint-4"
    saved = {path.name for path in checkpoint.iterdir()}
    assert "adapter_model.safetensors" in saved
    assert "model.safetensors" not in saved
    trained = sum(p.numel() for p in whole.model.parameters() if p.requires_grad)
    total = sum(path.stat().st_size for path in (checkpoint / "engine").rglob("*.safetensors"))
    assert 12 * trained <= total < 14 * trained + 64 * 1024  # a master and two moments; no base
    resumed = over_engine(
        with_adapter(kit, seed=1),
        kit.arguments(tmp_path / "b", load_best_model_at_end=True, **args),
        offload={"host_memory": "64MiB"},
        **data,
    )
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert kit.logged(resumed, "loss") == kit.logged(whole, "loss")
    assert resumed.evaluate()["eval_loss"] == resumed.state.best_metric


def test_what_is_no_checkpoint_of_this_run_is_refused(
    kit: SimpleNamespace, on_nvme: Make, over_engine: Make, tmp_path: Path
) -> None:
    args = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    over_engine(kit.llama(), kit.arguments(tmp_path, **args), train_dataset=kit.rows(), offload=on_nvme()).train()

    def resume(model: Any, checkpoint: Path) -> None:
        over_engine(
            model, kit.arguments(tmp_path / "again", **args), train_dataset=kit.rows(), offload=on_nvme()
        ).train(resume_from_checkpoint=str(checkpoint))

    checkpoint = tmp_path / "checkpoint-1"
    with pytest.raises(CheckpointMismatch):
        resume(kit.gpt2(), checkpoint)
    damaged = tmp_path / "damaged"
    shutil.copytree(checkpoint, damaged)
    largest = max((damaged / "engine").rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[-1] ^= 1
    largest.write_bytes(content)
    with pytest.raises(CheckpointDamaged):
        resume(kit.llama(), damaged)
    shutil.rmtree(damaged / "engine")
    with pytest.raises(FileNotFoundError, match="save_only_model"):
        resume(kit.llama(), damaged)


def test_weights_of_another_model_are_refused(
    kit: SimpleNamespace, on_nvme: Make, over_engine: Make, tmp_path: Path
) -> None:
    """A plain checkpoint whose weights do not fit is no fresh start with the optimizer's old moments."""
    args = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    transformers.Trainer(kit.gpt2(), kit.arguments(tmp_path, **args), train_dataset=kit.rows()).train()
    over = over_engine(
        kit.llama(), kit.arguments(tmp_path / "over", **args), train_dataset=kit.rows(), offload=on_nvme()
    )
    with pytest.raises(ValueError, match="does not fit the model: missing"):
        over.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_parameters_of_several_dtypes_are_saved_as_they_came(
    kit: SimpleNamespace, on_nvme: Make, over_engine: Make, tmp_path: Path
) -> None:
    model = kit.llama()
    model.lm_head.bfloat16()
    args = kit.arguments(tmp_path, max_steps=1, bf16=True)
    over = over_engine(model, args, train_dataset=kit.rows(), offload=on_nvme())
    over.train()
    over.save_model()
    safetensors = pytest.importorskip("safetensors.torch")
    saved = safetensors.load_file(tmp_path / "model.safetensors")
    weights = over.engine.state_dict()
    assert saved.keys() == weights.keys()
    for name, value in saved.items():
        assert value.dtype is (torch.bfloat16 if name == "lm_head.weight" else torch.float32)
        assert torch.equal(value, weights[name].to(value.dtype))
    assert transformers.AutoConfig.from_pretrained(tmp_path).dtype is torch.float32
