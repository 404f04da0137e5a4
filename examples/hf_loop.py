"""A Hugging Face model in a loop of your own: the lines marked <-- are all that changes.

Accumulation, a schedule, evaluation, a folder that `from_pretrained` reads.
"""

import tempfile
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, get_cosine_schedule_with_warmup

from offload import AdamW, OffloadConfig, OffloadEngine

torch.manual_seed(0)
rows = torch.randint(0, 256, (16, 32)).repeat(1, 2)  # each row says the same thing twice: learnable
model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=64, n_embd=128, n_layer=4, n_head=4))

with tempfile.TemporaryDirectory(dir=".") as folder:
    config = OffloadConfig(
        nvme=Path(folder) / "nvme",
        host_memory="16MiB",
        dtype=torch.float32,
        micro_batches=2,
        clip_grad_norm=1.0,
        homes={"states": "nvme"},
    )
    with OffloadEngine(model, AdamW(lr=3e-3, weight_decay=0.01), config) as engine:  # <-- instead of an optimizer
        schedule = get_cosine_schedule_with_warmup(engine.optimizer, num_warmup_steps=2, num_training_steps=12)
        for step in range(12):
            order = torch.randperm(len(rows))
            for batch in rows[order[:8]].split(4):
                loss = engine(input_ids=batch, labels=batch).loss / 2  # <-- instead of model(...)
                engine.backward(loss)
            info = engine.step()  # <-- instead of optimizer.step(), optimizer.zero_grad()
            schedule.step()
            if step % 4 == 3:
                engine.eval()
                with torch.no_grad():
                    loss = engine(input_ids=rows, labels=rows).loss
                engine.train()
                print(f"step {info.step}  loss {loss.item():.4f}  lr {info.lr:.1e}  norm {info.grad_norm:.3f}")
        engine.save_pretrained(Path(folder) / "tuned")  # <-- instead of model.save_pretrained(...)

    tuned = GPT2LMHeadModel.from_pretrained(Path(folder) / "tuned").eval()
    with torch.no_grad():
        print(f"from the saved folder: loss {tuned(rows, labels=rows).loss.item():.4f}")
