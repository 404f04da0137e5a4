"""LoRA: a frozen base streams read-only from a folder, its adapters train. With transformers and peft, or without.

The base is a small random Llama, so that nothing is downloaded; a real one comes from `from_pretrained`. In the folder
the base is written once, when the engine is built; what steps write are the adapters.
"""

import tempfile

import torch
from torch import nn

from offload import AdamW, OffloadConfig, OffloadEngine

torch.manual_seed(0)


def with_peft() -> nn.Module:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=128, num_key_value_heads=4, **size))
    return get_peft_model(base, LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "v_proj", "down_proj"]))


class Lora(nn.Module):
    """A frozen linear layer with a low-rank adapter beside it."""

    def __init__(self, base: nn.Linear, rank: int = 8) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + 4 * self.up(self.down(x))


class WithoutPeft(nn.Module):
    """The same by hand, on layers of torch's own."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.TransformerEncoderLayer(128, 4, 384, dropout=0.0, batch_first=True) for _ in range(4)]
        self.base = nn.Sequential(nn.Embedding(128, 128), *layers, nn.Linear(128, 128)).requires_grad_(False)
        for layer in layers:
            layer.linear1, layer.linear2 = Lora(layer.linear1), Lora(layer.linear2)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.base(input_ids)[:, :-1]
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())}


try:
    model = with_peft()
except ImportError:
    model = WithoutPeft()
data = torch.randint(0, 128, (4, 16)).repeat(1, 2)
trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
print(f"{trainable:,} of {sum(p.numel() for p in model.parameters()):,} parameters train")

with tempfile.TemporaryDirectory(dir=".") as folder:
    # States and gradients exist for adapters only, and stay in memory; most of the base does not fit and streams.
    config = OffloadConfig(nvme=folder, host_memory="5MiB", dtype=torch.float32, durability="none")
    with OffloadEngine(model, AdamW(lr=1e-2), config) as engine:
        for _ in range(6):
            loss = engine(input_ids=data, labels=data)["loss"]
            engine.backward(loss)
            info = engine.step()
            read, written = info.nbytes["read"], info.nbytes["write"]
            print(f"step {info.step}  loss {loss.item():.4f}  read {read} B  written {written} B")
