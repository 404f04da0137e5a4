"""`transformers.Trainer` over an engine: an existing script runs with one changed import.

    from offload.integrations.transformers import OffloadTrainer as Trainer

    trainer = Trainer(model, args, train_dataset=data, offload={"nvme": "/mnt/nvme/run1", "host_memory": "8GiB"})

The trainer's loop, optimizer, schedule, logs and checkpoint folders are its own; parameters, gradients and states are
the engine's. `trainer.engine` is there from the first `train()` or `evaluate()` on.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..engine import OffloadEngine
from .routing import route_calls, unroute_calls
from .trainer_checkpoint import LoadedDtypes, load_state, load_weights, save_state
from .trainer_settings import Settings, check_arguments, make_config, make_spec

try:
    import accelerate  # noqa: F401  the Trainer cannot be made without it
    from transformers import PreTrainedModel, Seq2SeqTrainer, Trainer, TrainingArguments
    from transformers.trainer import SCHEDULER_NAME
except ImportError as error:
    raise ImportError(
        f"offload.integrations.transformers needs transformers and accelerate ({error}); pip install "
        '"offload[transformers]"'
    ) from error

Base: Any = object  # a class that is mixed into a Trainer has its methods without being one


@dataclass
class OffloadTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the engine's settings, for scripts that read their arguments from a command line."""

    offload: str | None = field(
        default=None,
        metadata={
            "help": """Settings of OffloadConfig as JSON, e.g. '{"nvme": "/mnt/nvme/run1", "dtype": "bfloat16"}'."""
        },
    )


class OffloadMixin(Base):
    """What makes a `Trainer` train over an engine. For a trainer of your own: `class Mine(OffloadMixin, SFTTrainer)`.

    Args:
        offload: an `OffloadConfig`; its settings as a mapping or JSON, where dtype follows the model and `bf16` unless
            given, and durability is "none" unless given, because the trainer's checkpoints are what survives; None
            takes `args.offload` if there is one, else the defaults.

    Attributes:
        engine: the engine, once the model has been trained or evaluated.

    Raises: ValueError for arguments that the engine cannot keep, with the mend.
    """

    engine: OffloadEngine | None = None
    optimizer: Any

    def __init__(self, *args: Any, offload: Settings = None, **kwargs: Any) -> None:
        self._settings = offload
        super().__init__(*args, **kwargs)

    # -- construction

    def create_accelerator_and_postprocess(self) -> None:
        check_arguments(self.args)
        super().create_accelerator_and_postprocess()
        self.accelerator.clip_grad_norm_ = self._clip_gradients

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Never: the engine brings units to the device."""

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        """Comes after `create_optimizer` and before anything is prepared: here the engine takes the model over."""
        if self.engine is not None and self.engine.module is not self.model:  # model_init made another one
            self.engine.close()
            self.engine = None
        if self.engine is None:
            self._begin_engine()
        return self.model

    def _begin_engine(self) -> None:
        self.create_optimizer()
        self._set_signature_columns_if_needed()  # of the model's own forward
        settings = self._settings if self._settings is not None else getattr(self.args, "offload", None)
        config = make_config(settings, self.args, self.model)
        self._dtypes = {parameter: parameter.dtype for parameter in self.model.parameters()}
        self._loaded_dtype = getattr(self.model, "dtype", None)
        # autocast around forward, where bf16=True asks for it; the same object is never prepared again
        self.accelerator.prepare_model(self.model, device_placement=False, evaluation_mode=True)
        self.engine = OffloadEngine(self.model, make_spec(self.optimizer), config)
        route_calls(self.engine)
        if hasattr(self.model, "save_pretrained"):
            self.model.save_pretrained = self._save_weights
        self.optimizer = self.engine.optimizer
        self.optimizer.accept_partial = True
        self.optimizer._is_accelerate_prepared = True
        self.optimizer.step_was_skipped = False

    def close(self) -> None:
        """Close the engine; its values go with it, so save the model before. Twice is safe."""
        if self.engine is not None:
            self.engine.close()
            unroute_calls(self.engine.module)
            self.engine.module.__dict__.pop("save_pretrained", None)

    # -- steps

    def _clip_gradients(self, parameters: Iterable[nn.Parameter], max_norm: float, norm_type: float = 2.0) -> Tensor:
        """In place of the accelerator's."""
        assert self.engine is not None, "gradients exist only once the engine does"
        return self.engine.clip_grad_norm_(max_norm, norm_type)

    # -- what is saved and loaded

    def _save_weights(
        self,
        save_directory: str | os.PathLike[str],
        state_dict: Any = None,
        is_main_process: bool = True,
        **others: Any,
    ) -> None:
        """In place of the model's `save_pretrained`: full precision, in the dtype in which the model came."""
        assert self.engine is not None, "the method was replaced when the engine was made"
        dtypes = set(self._dtypes.values())
        whole = isinstance(self.model, PreTrainedModel) and not _is_adapted(self.model)
        if whole and state_dict is None and not others and len(dtypes) == 1:
            self.engine.save_pretrained(save_directory, dtype=dtypes.pop())  # part by part
            return
        if state_dict is None:
            weights = LoadedDtypes(self.engine, self._dtypes)
            state_dict = weights if _is_adapted(self.model) else dict(weights)
        save = type(self.model).save_pretrained
        save(self.model, save_directory, state_dict=state_dict, is_main_process=is_main_process, **others)
        if whole:  # it has written down the dtype that it computes in
            self.model.config.dtype = self._loaded_dtype
            self.model.config.save_pretrained(save_directory)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if self.engine is not None and state_dict is None and not hasattr(self.model, "save_pretrained"):
            state_dict = dict(LoadedDtypes(self.engine, self._dtypes))
        super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        assert self.engine is not None, "a checkpoint is saved while training"
        save_state(self.engine, Path(output_dir), frozen=not _is_adapted(self.model))
        torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Nothing yet: weights come with the engine's state, once there is an engine to take them."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        assert self.engine is not None, "the model is wrapped before a checkpoint is loaded"
        load_state(self.engine, Path(checkpoint))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _load_best_model(self) -> None:
        assert self.engine is not None, "the best model was found while training"
        load_weights(self.engine, Path(self.state.best_model_checkpoint))


def _is_adapted(model: nn.Module) -> bool:
    """Whether PEFT has put an adapter on the model, which is then all that it saves."""
    return hasattr(model, "peft_config")


class OffloadTrainer(OffloadMixin, Trainer):
    """`transformers.Trainer` over an engine; see `OffloadMixin`."""


class OffloadSeq2SeqTrainer(OffloadMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` over an engine; see `OffloadMixin`."""
