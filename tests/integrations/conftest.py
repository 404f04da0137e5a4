"""What the tests of integrations share: tiny random models, data, trainers over an engine with everything on NVMe."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

VOCAB, LENGTH, ROWS = 61, 16, 22
ON_NVME = {"param": "nvme", "states": "nvme", "grad": "nvme"}


def allow_half_a_torchvision() -> None:
    """A torchvision whose operators were built for another torch cannot be imported, and transformers then has no
    models. Declaring the operators that it adds to is enough for what is tested here."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return
    except RuntimeError:
        for name in ("nms", "qnms"):
            with contextlib.suppress(RuntimeError):
                torch.library.define(
                    f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                )


allow_half_a_torchvision()
transformers = pytest.importorskip(
    "transformers", reason="TRAINER TESTS NOT RUN: transformers is missing; pip install -r requirements-dev.txt"
)


def llama(seed: int = 0) -> nn.Module:
    """Four blocks, grouped-query attention, an untied head; no dropout."""
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
        )
    )


def gpt2(seed: int = 0) -> nn.Module:
    """Four blocks, biases, a tied head, dropout 0.1."""
    torch.manual_seed(seed)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=VOCAB, n_positions=32, n_embd=32, n_layer=4, n_head=4)
    )


def rows(num: int = ROWS, seed: int = 3) -> list[dict[str, Tensor]]:
    """`num` examples, int64 [LENGTH]; the first labels of every third row are ignored, so batches differ in size."""
    generator = torch.Generator().manual_seed(seed)
    data = []
    for number in range(num):
        tokens = torch.randint(VOCAB, (LENGTH,), generator=generator)
        labels = tokens.clone()
        if number % 3 == 0:
            labels[:7] = -100
        data.append({"input_ids": tokens, "labels": labels})
    return data


def arguments(folder: Path, kind: type | None = None, **settings: Any) -> Any:
    """Two epochs of 11 batches, warm-up, cosine, weight decay, every step logged."""
    common = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
        "warmup_steps": 2,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return (kind or transformers.TrainingArguments)(**{**common, **settings})


def logged(trainer: Any, key: str) -> list[float]:
    """Every value that was logged under `key`, in order."""
    return [entry[key] for entry in trainer.state.log_history if key in entry]


@pytest.fixture
def on_nvme(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Settings of an engine that keeps nothing in memory for good; each call names a new folder."""
    made = 0

    def settings(**others: Any) -> dict[str, Any]:
        nonlocal made
        made += 1
        return {"nvme": str(tmp_path / f"nvme{made}"), "host_memory": "4MiB", "homes": ON_NVME, **others}

    return settings


@pytest.fixture
def over_engine() -> Iterator[Callable[..., Any]]:
    """`OffloadTrainer(...)`, of another class if `kind` is given; closed at the end of the test."""
    from offload.integrations.transformers import OffloadTrainer

    made = []

    def make(*args: Any, kind: Any = OffloadTrainer, **kwargs: Any) -> Any:
        made.append(kind(*args, **kwargs))
        return made[-1]

    yield make
    for trainer in made:
        trainer.close()


@pytest.fixture
def kit() -> SimpleNamespace:
    return SimpleNamespace(llama=llama, gpt2=gpt2, rows=rows, arguments=arguments, logged=logged)
