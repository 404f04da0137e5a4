"""A Hugging Face Trainer script over an engine: the lines marked <-- are all that changes.

The folder that `from_pretrained` reads is made on the spot, with random weights, so nothing is downloaded.
"""

import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TrainingArguments

from offload.integrations.transformers import OffloadTrainer as Trainer  # <-- instead of transformers.Trainer

torch.manual_seed(0)
rows = torch.randint(0, 256, (16, 32)).repeat(1, 2)  # each row says the same thing twice: learnable
data = [{"input_ids": row, "labels": row.clone()} for row in rows]

with tempfile.TemporaryDirectory(dir=".") as folder:
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=256, **shape)).save_pretrained(Path(folder) / "pretrained")

    model = AutoModelForCausalLM.from_pretrained(Path(folder) / "pretrained")
    arguments = TrainingArguments(
        output_dir=str(Path(folder) / "run"),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=12,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        logging_steps=3,
        save_steps=6,
        report_to="none",
        disable_tqdm=True,
    )
    settings = {"nvme": str(Path(folder) / "nvme"), "host_memory": "16MiB", "homes": {"states": "nvme"}}
    trainer = Trainer(model, arguments, train_dataset=data, offload=settings)  # <-- where the bytes rest
    trainer.train()
    for entry in trainer.state.log_history[:-1]:
        print(f"step {entry['step']}  loss {entry['loss']:.4f}  gradient norm {entry['grad_norm']:.3f}")

    trainer.save_model(str(Path(folder) / "tuned"))
    trainer.close()  # <-- before its folder goes
    tuned = AutoModelForCausalLM.from_pretrained(Path(folder) / "tuned")
    with torch.no_grad():
        print(f"from the saved folder: loss {tuned(rows, labels=rows).loss.item():.4f}")
