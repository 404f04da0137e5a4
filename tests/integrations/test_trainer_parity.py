"""The Trainer over an engine with everything on NVMe reports and leaves what the plain Trainer does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
from offload.integrations.transformers import OffloadMixin, OffloadSeq2SeqTrainer, OffloadTrainer  # noqa: E402

Make = Callable[..., Any]

# One ulp in a gradient, from sums in another order, is all that a step can differ by. Adam divides a gradient by its
# own size, so GPT-2's key biases, whose gradient is nothing but rounding, move by up to a learning rate per step.
LOSS, NORM, WEIGHT, KEY_BIAS = 2e-6, 2e-5, 2e-6, 2e-3


def compare(plain: Any, over: Any, coarser: float = 1.0) -> None:
    """Logs: the same entries, losses, norms and rates. Final weights of both.

    Args:
        coarser: factor on the tolerances of fp32.
    """
    for ours, theirs in zip(over.state.log_history, plain.state.log_history, strict=True):
        assert ours.keys() == theirs.keys() - {"eval_model_preparation_time"}  # nothing is moved to a device
        assert ours.get("learning_rate") == theirs.get("learning_rate")
        assert ours.get("epoch") == theirs.get("epoch")
        for key, tolerance in (("loss", LOSS), ("grad_norm", NORM), ("eval_loss", LOSS), ("train_loss", LOSS)):
            if key in theirs:
                assert ours[key] == pytest.approx(theirs[key], rel=coarser * tolerance), key
    weights = over.engine.state_dict()
    expected = plain.model.state_dict()
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        tolerance = KEY_BIAS if name.endswith("attn.c_attn.bias") else WEIGHT
        torch.testing.assert_close(
            weights[name], value, rtol=0, atol=coarser * tolerance, msg=lambda message, name=name: f"{name}: {message}"
        )


@pytest.mark.parametrize("model", ["llama", "gpt2"])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("max_grad_norm", [0.5, 0.0])
def test_training_is_that_of_the_plain_trainer(
    model: str,
    accumulation: int,
    max_grad_norm: float,
    kit: SimpleNamespace,
    on_nvme: Make,
    over_engine: Make,
    tmp_path: Path,
) -> None:
    args = {"gradient_accumulation_steps": accumulation, "max_grad_norm": max_grad_norm}
    make = getattr(kit, model)
    plain = transformers.Trainer(make(), kit.arguments(tmp_path, **args), train_dataset=kit.rows(14))
    plain.train()
    over = over_engine(make(), kit.arguments(tmp_path, **args), train_dataset=kit.rows(14), offload=on_nvme())
    over.train()
    assert len(kit.logged(plain, "loss")) == 2 * -(-7 // accumulation)  # the last step of an epoch is a shorter one
    assert min(kit.logged(plain, "grad_norm")) > 0.5  # so that clipping, where it is on, changes every step
    compare(plain, over)
    assert set(over.engine.config.homes.values()) == {"nvme"}


class OwnLoss:
    """A compute_loss of the user's, which calls the model that it is handed and looks into it."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        assert isinstance(model, transformers.GPT2LMHeadModel)
        outputs = model(input_ids=inputs["input_ids"])
        logits = outputs.logits[:, :-1].reshape(-1, model.config.vocab_size)
        loss = nn.functional.cross_entropy(logits, inputs["input_ids"][:, 1:].reshape(-1), label_smoothing=0.2)
        return (loss, outputs) if return_outputs else loss


class PlainOwnLoss(OwnLoss, transformers.Trainer):
    pass


class OverOwnLoss(OwnLoss, OffloadMixin, transformers.Trainer):
    pass


def own_loss_func(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
    logits = outputs.logits[:, :-1].reshape(-1, outputs.logits.shape[-1])
    return nn.functional.cross_entropy(logits, labels[:, 1:].reshape(-1), reduction="sum") / num_items_in_batch


@pytest.mark.parametrize(
    ("kinds", "arguments", "others"),
    [
        ((PlainOwnLoss, OverOwnLoss), {}, {}),
        ((transformers.Trainer, OffloadTrainer), {"label_smoothing_factor": 0.1}, {}),
        ((transformers.Trainer, OffloadTrainer), {}, {"compute_loss_func": own_loss_func}),
        ((transformers.Trainer, OffloadTrainer), {"activation_checkpointing": True}, {}),
        ((transformers.Trainer, OffloadTrainer), {"neftune_noise_alpha": 5.0}, {}),
        ((transformers.Trainer, OffloadTrainer), {"optim": "sgd", "learning_rate": 0.1}, {}),
        ((transformers.Trainer, OffloadTrainer), {"optim": "adamw_torch_fused", "adam_beta2": 0.95}, {}),
        (
            (transformers.Trainer, OffloadTrainer),
            {},
            {"optimizer_cls_and_kwargs": (torch.optim.Adam, {"lr": 2e-3, "eps": 1e-6})},
        ),
        (
            (transformers.Trainer, OffloadTrainer),
            {},
            {
                "optimizer_cls_and_kwargs": (
                    torch.optim.Adam,
                    {"lr": 2e-3, "weight_decay": 0.5, "decoupled_weight_decay": True},
                )
            },
        ),
    ],
    ids=[
        "compute_loss",
        "label_smoothing",
        "loss_func",
        "checkpointing",
        "neftune",
        "sgd",
        "fused",
        "adam",
        "decoupled",
    ],
)
def test_what_a_script_can_ask_for_is_kept(
    kinds: tuple[type, type],
    arguments: dict[str, Any],
    others: dict[str, Any],
    kit: SimpleNamespace,
    on_nvme: Make,
    over_engine: Make,
    tmp_path: Path,
) -> None:
    args = {"gradient_accumulation_steps": 2, "max_steps": 4, **arguments}
    plain = kinds[0](kit.gpt2(), kit.arguments(tmp_path, **args), train_dataset=kit.rows(), **others)
    plain.train()
    over = over_engine(
        kit.gpt2(),
        kit.arguments(tmp_path, **args),
        train_dataset=kit.rows(),
        offload=on_nvme(activation_memory=0),
        kind=kinds[1],
        **others,
    )
    over.train()
    compare(plain, over)


def test_weight_decay_leaves_out_what_the_trainer_leaves_out(
    kit: SimpleNamespace, on_nvme: Make, over_engine: Make, tmp_path: Path
) -> None:
    over = over_engine(kit.gpt2(), kit.arguments(tmp_path, max_steps=1), train_dataset=kit.rows(), offload=on_nvme())
    over.train()
    names = {parameter: name for name, parameter in over.model.named_parameters()}
    decayed, kept = over.optimizer.param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert {names[p] for p in kept["params"]} == {
        name for name in names.values() if name.endswith("bias") or "ln_" in name
    }
    assert len(decayed["params"]) + len(kept["params"]) == len(names)


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def test_evaluation_and_prediction_are_those_of_the_plain_trainer(
    kit: SimpleNamespace, on_nvme: Make, over_engine: Make, tmp_path: Path
) -> None:
    """Before training, within it, and after it."""
    seen = []
    for over in (False, True):
        make = over_engine if over else transformers.Trainer
        trainer = make(
            kit.gpt2(),
            kit.arguments(tmp_path, max_steps=4, eval_strategy="steps", eval_steps=2),
            train_dataset=kit.rows(),
            eval_dataset=kit.rows(5, seed=4),
            compute_metrics=accuracy,
            **({"offload": on_nvme()} if over else {}),
        )
        before = trainer.evaluate()
        trainer.train()
        seen.append((before, trainer.evaluate(), trainer.predict(kit.rows(3, seed=5)), trainer))
    plain, ours = seen
    for number in (0, 1):
        assert ours[number].keys() == plain[number].keys() - {"eval_model_preparation_time"}
        assert ours[number]["eval_loss"] == pytest.approx(plain[number]["eval_loss"], rel=LOSS)
        assert ours[number]["eval_accuracy"] == plain[number]["eval_accuracy"]
    assert ours[2].metrics["test_loss"] == pytest.approx(plain[2].metrics["test_loss"], rel=LOSS)
    assert ours[2].predictions == pytest.approx(plain[2].predictions, abs=2e-5)
    assert (ours[2].label_ids == plain[2].label_ids).all()
    compare(plain[3], ours[3])


class Watcher(transformers.TrainerCallback):
    """Notes which events it saw, and what the model that it is handed generates."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.tokens: list[list[int]] = []

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.seen.append("before step")

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.seen.append("stepped")

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        self.seen.append("micro-batch")

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        assert isinstance(model, transformers.LlamaForCausalLM)
        prompt = torch.arange(4)[None]
        self.tokens.append(model.generate(prompt, max_new_tokens=4, do_sample=False).tolist())


def test_callbacks_see_the_same_events_and_a_model_that_works(
    kit: SimpleNamespace, on_nvme: Make, over_engine: Make, tmp_path: Path
) -> None:
    watchers = []
    args = {"gradient_accumulation_steps": 2, "max_steps": 3, "learning_rate": 1e-2}
    for over in (False, True):
        watcher = Watcher()
        make = over_engine if over else transformers.Trainer
        make(
            kit.llama(),
            kit.arguments(tmp_path, **args),
            train_dataset=kit.rows(),
            callbacks=[watcher],
            **({"offload": on_nvme()} if over else {}),
        ).train()
        watchers.append(watcher)
    plain, ours = watchers
    assert ours.seen == plain.seen == ["micro-batch", "before step", "stepped"] * 3
    assert ours.tokens == plain.tokens


def test_bf16_computes_under_autocast_as_the_plain_trainer(
    kit: SimpleNamespace, on_nvme: Make, over_engine: Make, tmp_path: Path
) -> None:
    """With fp32 parameters the numbers are the plain ones; bf16 parameters, the default then, are near them."""
    args = {"bf16": True, "max_steps": 4}
    plain = transformers.Trainer(kit.llama(), kit.arguments(tmp_path, **args), train_dataset=kit.rows())
    plain.train()
    exact = over_engine(
        kit.llama(), kit.arguments(tmp_path, **args), train_dataset=kit.rows(), offload=on_nvme(dtype="float32")
    )
    exact.train()
    compare(plain, exact, coarser=100)  # an ulp of a weight now and then rounds to another bf16
    default = over_engine(kit.llama(), kit.arguments(tmp_path, **args), train_dataset=kit.rows(), offload=on_nvme())
    default.train()
    assert default.engine.config.dtype is torch.bfloat16
    assert kit.logged(default, "loss") == pytest.approx(kit.logged(plain, "loss"), rel=1e-3)
    assert kit.logged(default, "loss") != kit.logged(plain, "loss")


def test_a_script_without_settings_runs_in_memory(kit: SimpleNamespace, over_engine: Make, tmp_path: Path) -> None:
    args = {"max_steps": 2}
    plain = transformers.Trainer(kit.llama(), kit.arguments(tmp_path, **args), train_dataset=kit.rows())
    plain.train()
    over = over_engine(kit.llama(), kit.arguments(tmp_path, **args), train_dataset=kit.rows())
    over.train()
    compare(plain, over)


def test_training_twice_goes_on_as_the_plain_trainer_does(
    kit: SimpleNamespace, on_nvme: Make, over_engine: Make, tmp_path: Path
) -> None:
    trainers = []
    for over in (False, True):
        make = over_engine if over else transformers.Trainer
        trainer = make(
            kit.llama(),
            kit.arguments(tmp_path, max_steps=2),
            train_dataset=kit.rows(),
            **({"offload": on_nvme()} if over else {}),
        )
        trainer.train()
        trainer.train()
        trainers.append(trainer)
    compare(*trainers)


def test_model_init_begins_anew_each_time(
    kit: SimpleNamespace, on_nvme: Make, over_engine: Make, tmp_path: Path
) -> None:
    over = over_engine(
        args=kit.arguments(tmp_path, max_steps=2),
        model_init=lambda: kit.llama(),
        train_dataset=kit.rows(),
        offload=on_nvme(),
    )
    over.train()
    first, engine = kit.logged(over, "loss"), over.engine
    over.train()
    assert kit.logged(over, "loss") == first
    assert over.engine is not engine
    with pytest.raises(RuntimeError, match="closed"):
        engine.flush()


def test_a_sequence_to_sequence_trainer_generates_its_predictions(
    kit: SimpleNamespace, on_nvme: Make, over_engine: Make, tmp_path: Path
) -> None:
    data = [{**row, "decoder_input_ids": row["input_ids"]} for row in kit.rows()]
    trainers, predictions = [], []
    for over in (False, True):
        torch.manual_seed(0)
        model = transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                vocab_size=61, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
            )
        )
        model.generation_config.eos_token_id = None
        args = kit.arguments(
            tmp_path,
            transformers.Seq2SeqTrainingArguments,
            max_steps=3,
            learning_rate=1e-2,
            predict_with_generate=True,
            generation_max_length=8,
        )
        if over:
            trainer = over_engine(model, args, train_dataset=data, offload=on_nvme(), kind=OffloadSeq2SeqTrainer)
        else:
            trainer = transformers.Seq2SeqTrainer(model, args, train_dataset=data)
        trainer.train()
        predictions.append(trainer.predict(data[:3]).predictions.tolist())
        trainers.append(trainer)
    assert predictions[0] == predictions[1]
    assert len({token for row in predictions[0] for token in row}) > 1
    compare(*trainers, coarser=10)  # at ten times the learning rate
