"""LoRA on a Llama-shaped model whose frozen weights rest on a drive: only read, and never whole in RAM.

As it stands this is small and needs transformers. The real thing, 6.7 billion frozen parameters (14 GB of bf16):

    python examples/lora_bigger_than_memory.py --width 4096 --layers 32 --heads 32 --vocabulary 32000 --seq 64 \\
        --steps 3 --host-memory 2GiB --folder /mnt/nvme
"""

import argparse
import tempfile
import time

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import offload


class LoRA(nn.Module):
    """A frozen linear map and a trainable update of low rank: x W^T + x A^T B^T.

    Source: Hu et al. 2021, arXiv:2106.09685, section 4.1.
    """

    def __init__(self, frozen: nn.Linear, rank: int) -> None:
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        self.down = nn.Linear(frozen.in_features, rank, bias=False)
        self.up = nn.Linear(rank, frozen.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) + self.up(self.down(x))


def peak_rss_nbytes() -> int:
    """The largest resident set so far, in bytes (Linux)."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--width", type=int, default=128)
parser.add_argument("--layers", type=int, default=4)
parser.add_argument("--heads", type=int, default=4)
parser.add_argument("--vocabulary", type=int, default=256)
parser.add_argument("--rank", type=int, default=16)
parser.add_argument("--seq", type=int, default=32)
parser.add_argument("--steps", type=int, default=6)
parser.add_argument("--host-memory", default="24MiB")
parser.add_argument("--folder", default=".", help="on the drive that holds the weights, which are removed again")
options = parser.parse_args()

torch.manual_seed(0)
began = time.perf_counter()
with offload.deferred_init():  # parameters take no memory; each unit gets the values that an eager build would give it
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=options.vocabulary,
            hidden_size=options.width,
            intermediate_size=options.width * 43 // 16,  # 11008 for 4096
            num_hidden_layers=options.layers,
            num_attention_heads=options.heads,
        )
    ).requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.q_proj = LoRA(layer.self_attn.q_proj, options.rank)
        layer.self_attn.v_proj = LoRA(layer.self_attn.v_proj, options.rank)
frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
print(
    f"built {frozen / 1e6:.1f}M frozen and {trainable / 1e6:.2f}M trainable parameters in "
    f"{time.perf_counter() - began:.1f} s, peak RSS {peak_rss_nbytes() / 2**30:.2f} GiB",
    flush=True,
)

tokens = torch.randint(0, options.vocabulary, (1, options.seq // 2)).repeat(1, 2)  # the same thing twice: learnable
with tempfile.TemporaryDirectory(dir=options.folder) as nvme:
    config = offload.OffloadConfig(nvme=nvme, host_memory=options.host_memory)
    began = time.perf_counter()
    with offload.OffloadEngine(model, offload.AdamW(lr=1e-3), config) as engine:
        filled_s = time.perf_counter() - began
        print(f"filled in {filled_s:.1f} s, peak RSS {peak_rss_nbytes() / 2**30:.2f} GiB", flush=True)
        for _ in range(options.steps):
            loss = engine(tokens, labels=tokens, use_cache=False).loss
            engine.backward(loss)
            info = engine.step()
            moved = ", ".join(f"{lane} {nbytes / 1e9:.3f}" for lane, nbytes in info.nbytes.items() if nbytes)
            print(
                f"step {info.step}  loss {loss.item():.4f}  {info.seconds:.1f} s  GB by lane: {moved}  "
                f"peak RSS {peak_rss_nbytes() / 2**30:.2f} GiB",
                flush=True,
            )
