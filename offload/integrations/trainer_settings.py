"""What a trainer's arguments and its torch optimizer mean for an engine; what cannot be kept is refused."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..config import OffloadConfig
from ..optimizers import SGD, Adam, AdamW, OptimizerSpec
from ..torch_optimizer import TorchOptimizer
from ..torch_states import HOW_NOT_WHAT

Settings = Mapping[str, Any] | str | OffloadConfig | None

SPECS: dict[type[torch.optim.Optimizer], type[OptimizerSpec]] = {
    torch.optim.AdamW: AdamW,
    torch.optim.Adam: Adam,
    torch.optim.SGD: SGD,
}


def check_arguments(args: Any) -> None:
    """Raises: ValueError for what the engine and the trainer cannot do together, in one sentence with the mend.

    Args:
        args: a `transformers.TrainingArguments`.
    """
    for refused, why in (
        (args.deepspeed, "deepspeed=... places the same states that the engine places; take it out"),
        (
            args.fsdp,
            "fsdp=... shards parameters over processes, and the engine is one process on one device; take it out",
        ),
        (
            args.world_size > 1,
            f"{args.world_size} processes were launched, and the engine trains in one; start the script with python",
        ),
        (
            args.n_gpu > 1,
            f"torch sees {args.n_gpu} GPUs, over which the trainer would split each batch; show it one, with "
            "CUDA_VISIBLE_DEVICES=0",
        ),
        (
            args.torch_compile,
            "torch_compile=True compiles the whole model, whose parameters come and go; compile its blocks "
            "before they are given to the trainer",
        ),
        (args.fp16, "fp16=True scales losses by a GradScaler that reads gradients; give bf16=True"),
        (
            args.fp16_full_eval or args.bf16_full_eval,
            "full 16-bit evaluation casts the whole model; evaluation computes in the engine's dtype: take it out",
        ),
        (
            args.auto_find_batch_size,
            "auto_find_batch_size=True begins training anew with what a failed attempt left; give "
            "per_device_train_batch_size",
        ),
    ):
        if refused:
            raise ValueError(f"OffloadTrainer: {why}")


def make_config(settings: Settings, args: Any, model: nn.Module) -> OffloadConfig:
    """The engine's configuration: `settings`, completed by what the trainer's arguments say.

    Args:
        settings: an `OffloadConfig`; its settings as a mapping or as JSON, where dtype may be a name and is otherwise
            bfloat16 with `bf16=True` or for a model of bf16 parameters, else float32, and durability is "none" because
            the trainer's checkpoints are what survives; or None, for the defaults of these.

    Raises: ValueError for settings that contradict the arguments.
    """
    config = settings if isinstance(settings, OffloadConfig) else _from_mapping(settings, args, model)
    steps = args.gradient_accumulation_steps
    if config.micro_batches not in (1, steps):
        raise ValueError(
            f"micro_batches={config.micro_batches} and gradient_accumulation_steps={steps}; set the latter alone"
        )
    if config.clip_grad_norm is not None:
        raise ValueError(
            f"clip_grad_norm={config.clip_grad_norm} would clip a second time; set TrainingArguments(max_grad_norm=...)"
        )
    if config.update == "backward" and args.max_grad_norm > 0:
        raise ValueError(
            f'update="backward" begins before the norm is known, so max_grad_norm={args.max_grad_norm} cannot be kept; '
            'give max_grad_norm=0, or update="speculative" or "next_forward"'
        )
    if config.resume:
        raise ValueError(
            "resume=True goes on in the engine's store, of which the trainer knows nothing; call "
            "trainer.train(resume_from_checkpoint=...)"
        )
    if config.dtype is torch.float16:
        raise ValueError(
            "dtype=torch.float16 needs its losses scaled by engine.backward, which the trainer does not call; give "
            "bfloat16, or write the loop yourself"
        )
    if config.dtype is torch.bfloat16 and not (args.bf16 or _is_of_bf16(model)):
        raise ValueError(
            "OffloadConfig.dtype is bfloat16, its default, while neither the arguments nor the model say so; give "
            "TrainingArguments(bf16=True), or OffloadConfig(dtype=torch.float32)"
        )
    device = str(args.device) if config.device == "auto" else config.device
    return replace(config, micro_batches=steps, device=device)


def _from_mapping(settings: Mapping[str, Any] | str | None, args: Any, model: nn.Module) -> OffloadConfig:
    given = json.loads(settings) if isinstance(settings, str) else dict(settings or {})
    dtype = given.pop("dtype", None)
    if dtype is None:
        dtype = torch.bfloat16 if args.bf16 or _is_of_bf16(model) else torch.float32
    elif isinstance(dtype, str):
        dtype = getattr(torch, dtype, dtype)
    return OffloadConfig(**{"durability": "none", **given, "dtype": dtype})


def _is_of_bf16(model: nn.Module) -> bool:
    return any(parameter.dtype is torch.bfloat16 for parameter in model.parameters())


def make_spec(optimizer: torch.optim.Optimizer) -> OptimizerSpec:
    """The spec of a torch optimizer that was made around the model and has made no step.

    Raises: ValueError for one that has stepped, or of a class that the engine cannot run.
    """
    if optimizer.state:
        raise ValueError(
            f"the {type(optimizer).__name__} has stepped before; give a new one, or resume from a checkpoint folder"
        )
    kind = SPECS.get(type(optimizer))
    if kind is None or _has_more_settings(optimizer, kind):
        accepted = set(inspect.signature(type(optimizer)).parameters) & set(optimizer.defaults)
        settings = {name: optimizer.defaults[name] for name in accepted}
        groups = [{name: group[name] for name in ("params", *accepted)} for group in optimizer.param_groups]
        return TorchOptimizer(type(optimizer), groups=groups, **settings)
    names = kind().defaults
    groups = [
        {"params": list(group["params"]), **{name: _number(group[name]) for name in names}}
        for group in optimizer.param_groups
    ]
    defaults = {name: _number(optimizer.defaults[name]) for name in names}
    return kind(**defaults, groups=groups)


def _has_more_settings(optimizer: torch.optim.Optimizer, kind: type[OptimizerSpec]) -> bool:
    """Whether a setting that the engine's own kernels do not know (amsgrad, ...) is not at torch's default."""
    ours = kind().defaults
    torchs = {name: one.default for name, one in inspect.signature(type(optimizer)).parameters.items()}
    return any(
        group[name] != torchs[name]
        for group in optimizer.param_groups
        for name in torchs.keys() & group.keys() - ours.keys() - HOW_NOT_WHAT - {"params"}
    )


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) else value
