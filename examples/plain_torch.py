"""A plain PyTorch loop, trained by the engine: the lines marked <-- are all that changes.

The states of this model (3.2M parameters, 12 bytes each) rest in a folder instead of in memory.
"""

import tempfile

import torch
from torch import nn

from offload import AdamW, OffloadConfig, OffloadEngine

torch.manual_seed(0)
layers = [nn.TransformerEncoderLayer(256, 4, dim_feedforward=1024, batch_first=True, dropout=0.0) for _ in range(4)]
model = nn.Sequential(nn.Embedding(256, 256), *layers, nn.Linear(256, 256))
data = torch.randint(0, 256, (4, 33)).repeat(1, 2)  # each row says the same thing twice: learnable

with tempfile.TemporaryDirectory(dir=".") as folder:
    config = OffloadConfig(nvme=folder, host_memory="64MiB", dtype=torch.float32, homes={"states": "nvme"})
    with OffloadEngine(model, AdamW(lr=1e-3, weight_decay=0.01), config) as engine:  # <-- instead of an optimizer
        for _ in range(8):
            logits = engine(data[:, :-1])  # <-- instead of model(...)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), data[:, 1:].flatten())
            engine.backward(loss)
            info = engine.step()  # <-- instead of optimizer.step(), optimizer.zero_grad()
            print(f"step {info.step}  loss {loss.item():.4f}  read {info.nbytes['read']} B in {info.seconds:.2f} s")
