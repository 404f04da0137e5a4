"""Full training of a model whose weights and states are larger than memory: it is never whole in RAM.

As it stands this is small. The real thing, 1.97 billion parameters (24 GB of weights and states, 48 GB on the drive):

    python examples/bigger_than_memory.py --width 2560 --layers 25 --heads 20 --seq 128 --steps 3 --host-memory 2GiB \\
        --folder /mnt/nvme
"""

import argparse
import tempfile
import time

import torch
from torch import nn

import offload


def peak_rss_nbytes() -> int:
    """The largest resident set so far, in bytes (Linux)."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--width", type=int, default=256)
parser.add_argument("--layers", type=int, default=4)
parser.add_argument("--heads", type=int, default=4)
parser.add_argument("--seq", type=int, default=32)
parser.add_argument("--steps", type=int, default=4)
parser.add_argument("--host-memory", default="24MiB")
parser.add_argument("--folder", default=".", help="a folder on the drive that holds the states; they are removed again")
options = parser.parse_args()

torch.manual_seed(0)
began = time.perf_counter()
with offload.deferred_init():  # parameters take no memory; each unit gets the values that an eager build would give it
    width = options.width
    blocks = [
        nn.TransformerEncoderLayer(width, options.heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        for _ in range(options.layers)
    ]
    model = nn.Sequential(nn.Embedding(256, width), *blocks, nn.LayerNorm(width), nn.Linear(width, 256))
numel = sum(parameter.numel() for parameter in model.parameters())
built_s = time.perf_counter() - began
print(
    f"built {numel / 1e6:.0f}M parameters in {built_s:.1f} s, peak RSS {peak_rss_nbytes() / 2**30:.2f} GiB", flush=True
)

tokens = torch.randint(0, 256, (1, options.seq // 2)).repeat(1, 2)  # a row that says the same thing twice: learnable
with tempfile.TemporaryDirectory(dir=options.folder) as nvme:
    config = offload.OffloadConfig(nvme=nvme, host_memory=options.host_memory, activation_memory=0)
    began = time.perf_counter()
    with offload.OffloadEngine(model, offload.AdamW(lr=1e-4), config) as engine:
        filled_s = time.perf_counter() - began
        print(f"filled in {filled_s:.1f} s, peak RSS {peak_rss_nbytes() / 2**30:.2f} GiB", flush=True)
        for _ in range(options.steps):
            logits = engine(tokens)
            loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())
            engine.backward(loss)
            info = engine.step()
            moved = ", ".join(f"{lane} {nbytes / 1e9:.2f}" for lane, nbytes in info.nbytes.items() if nbytes)
            print(
                f"step {info.step}  loss {loss.item():.4f}  {info.seconds:.1f} s  GB by lane: {moved}  "
                f"peak RSS {peak_rss_nbytes() / 2**30:.2f} GiB",
                flush=True,
            )
        began = time.perf_counter()
        engine.flush()
        print(f"last step durable after {time.perf_counter() - began:.1f} s more")
