"""What a trainer and an engine cannot do together is refused in one sentence; a missing package is named."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
from offload import SGD, AdamW, OffloadConfig, TorchOptimizer  # noqa: E402
from offload.integrations.trainer_settings import check_arguments, make_config, make_spec  # noqa: E402
from offload.integrations.transformers import OffloadTrainingArguments  # noqa: E402

Make = Callable[..., Any]
GOOD = {
    "deepspeed": None,
    "fsdp": None,
    "world_size": 1,
    "n_gpu": 0,
    "torch_compile": False,
    "fp16": False,
    "fp16_full_eval": False,
    "bf16_full_eval": False,
    "auto_find_batch_size": False,
}


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("deepspeed", "zero3.json"),
        ("fsdp", "full_shard"),
        ("world_size", 2),
        ("n_gpu", 2),
        ("torch_compile", True),
        ("fp16", True),
        ("fp16_full_eval", True),
        ("bf16_full_eval", True),
        ("auto_find_batch_size", True),
    ],
)
def test_what_cannot_be_kept_is_refused(setting: str, value: Any) -> None:
    check_arguments(SimpleNamespace(**GOOD))
    with pytest.raises(ValueError, match="OffloadTrainer: ") as refusal:
        check_arguments(SimpleNamespace(**{**GOOD, setting: value}))
    assert "; " in str(refusal.value) or ": " in str(refusal.value).removeprefix("OffloadTrainer: ")


def test_a_trainer_is_refused_before_it_is_made(kit: SimpleNamespace, over_engine: Make, tmp_path: Path) -> None:
    args = kit.arguments(tmp_path, auto_find_batch_size=True)
    with pytest.raises(ValueError, match="auto_find_batch_size"):
        over_engine(kit.llama(), args, train_dataset=kit.rows())


@pytest.mark.parametrize(
    ("config", "arguments", "words"),
    [
        ({"micro_batches": 3}, {"gradient_accumulation_steps": 2}, "gradient_accumulation_steps=2"),
        ({"clip_grad_norm": 1.0}, {}, "max_grad_norm"),
        ({"update": "backward"}, {"max_grad_norm": 1.0}, "max_grad_norm=0"),
        ({"dtype": torch.float16}, {}, "give bfloat16"),
        ({"dtype": torch.bfloat16}, {}, "bf16=True"),
    ],
)
def test_settings_that_contradict_the_arguments_are_refused(
    config: dict[str, Any], arguments: dict[str, Any], words: str, kit: SimpleNamespace, tmp_path: Path
) -> None:
    args = kit.arguments(tmp_path, **{"max_grad_norm": 0.0, **arguments})
    with pytest.raises(ValueError, match=words):
        make_config(OffloadConfig(**{"dtype": torch.float32, **config}), args, kit.llama())


def test_resuming_the_store_is_refused(kit: SimpleNamespace, tmp_path: Path) -> None:
    config = OffloadConfig(dtype=torch.float32, nvme=tmp_path, resume=True)
    with pytest.raises(ValueError, match="resume_from_checkpoint"):
        make_config(config, kit.arguments(tmp_path), kit.llama())


def test_settings_are_completed_from_arguments_and_model(kit: SimpleNamespace, tmp_path: Path) -> None:
    args = kit.arguments(tmp_path, gradient_accumulation_steps=3)
    config = make_config({"nvme": str(tmp_path)}, args, kit.llama())
    assert (config.micro_batches, config.dtype, config.durability) == (3, torch.float32, "none")
    assert (config.device, config.clip_grad_norm) == ("cpu", None)
    assert make_config(None, kit.arguments(tmp_path, bf16=True), kit.llama()).dtype is torch.bfloat16
    assert make_config(None, args, kit.llama().bfloat16()).dtype is torch.bfloat16
    given = OffloadConfig(dtype=torch.float32, nvme=tmp_path, durability=5)
    assert make_config(given, args, kit.llama()).durability == 5


def test_settings_come_from_a_command_line(kit: SimpleNamespace, over_engine: Make, tmp_path: Path) -> None:
    settings = json.dumps({"nvme": str(tmp_path / "nvme"), "host_memory": "4MiB", "dtype": "float32"})
    parser = transformers.HfArgumentParser(OffloadTrainingArguments)
    line = f"--output_dir {tmp_path} --max_steps 1 --use_cpu --report_to none --save_strategy no --offload"
    (args,) = parser.parse_args_into_dataclasses([*line.split(), settings])
    over = over_engine(kit.llama(), args, train_dataset=kit.rows())
    over.train()
    assert over.engine.config.nvme == str(tmp_path / "nvme")
    assert over.engine.config.dtype is torch.float32


def test_optimizers_become_specs() -> None:
    weight, bias = torch.nn.Parameter(torch.zeros(3, 2)), torch.nn.Parameter(torch.zeros(2))
    groups = [{"params": [weight], "weight_decay": 0.5}, {"params": [bias], "lr": torch.tensor(0.25)}]
    spec = make_spec(torch.optim.AdamW(groups, lr=0.125, betas=(0.8, 0.9), fused=False))
    assert isinstance(spec, AdamW)
    assert (spec.lr, spec.betas, spec.weight_decay) == (0.125, (0.8, 0.9), 0.01)
    assert [(group["lr"], group["weight_decay"]) for group in spec.groups] == [(0.125, 0.5), (0.25, 0.01)]
    assert isinstance(make_spec(torch.optim.SGD([weight], lr=0.1, momentum=0.9)), SGD)
    assert isinstance(make_spec(torch.optim.AdamW([weight], amsgrad=True)), TorchOptimizer)
    assert isinstance(make_spec(torch.optim.RMSprop([weight])), TorchOptimizer)


def test_optimizers_that_cannot_be_taken_are_refused() -> None:
    weight = torch.nn.Parameter(torch.ones(3, 2))
    stepped = torch.optim.AdamW([weight])
    weight.grad = torch.ones_like(weight)
    stepped.step()
    with pytest.raises(ValueError, match="has stepped before"):
        make_spec(stepped)
    with pytest.raises(ValueError, match="LBFGS"):
        make_spec(torch.optim.LBFGS([weight]))


def test_importing_offload_imports_no_transformers() -> None:
    script = (
        "import sys, offload; sys.exit(any(n.split('.')[0] in ('transformers', 'accelerate') for n in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-P", "-c", script], check=False).returncode == 0


@pytest.mark.parametrize("missing", ["transformers", "accelerate"])
def test_a_missing_package_is_named_with_the_mend(missing: str) -> None:
    script = f"import sys; sys.modules[{missing!r}] = None; import offload.integrations.transformers"
    done = subprocess.run([sys.executable, "-P", "-c", script], check=False, capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: offload.integrations.transformers needs transformers and accelerate")
    assert 'pip install "offload[transformers]"' in last
