"""A byte-level GPT: the model that the command line trains and the benches measure.

Pre-norm blocks (LayerNorm without bias), rotary positions, causal scaled-dot-product attention, GELU MLP, no biases,
head tied to the embedding. The vocabulary is the 256 byte values, so no tokenizer is needed and logits stay small.

Shapes in this file: B batch, T sequence, D width, H heads, K head width (D = H * K), L layers, V = 256.

Source: GPT-2 layout and initialisation (Radford et al. 2019, section 2.3); rotary positions (Su et al. 2021,
arXiv:2104.09864, section 3.2.2); tied head (Press and Wolf 2017, arXiv:1608.05859).
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_BYTE_VALUES = 256


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Shape of one GPT. All counts; `dropout` is a probability.

    Raises: ValueError if a count is below 1, the head width is not an even number, or `dropout` is not in [0, 1).
    """

    width: int
    num_layers: int
    num_heads: int
    context: int = 1024
    dropout: float = 0.0
    vocabulary: int = NUM_BYTE_VALUES

    def __post_init__(self) -> None:
        for name in ("width", "num_layers", "num_heads", "context", "vocabulary"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"GPTConfig.{name} is {getattr(self, name)}, expected at least 1. Pass a positive count."
                )
        if self.width % (2 * self.num_heads):
            raise ValueError(
                f"GPTConfig.width is {self.width} with {self.num_heads} heads: rotary positions need an even "
                f"head width. Make width a multiple of {2 * self.num_heads}."
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"GPTConfig.dropout is {self.dropout}, expected 0 <= dropout < 1.")

    @property
    def num_parameters(self) -> int:
        """Trainable parameters, the tied head counted once: L * (12 D^2 + 2 D) + V D + D."""
        per_block = 12 * self.width**2 + 2 * self.width
        return self.num_layers * per_block + self.vocabulary * self.width + self.width

    def flops_per_token(self, seq: int, *, recompute: bool = False) -> float:
        """Floating-point operations that one token costs in forward and backward at sequence length `seq`.

        Two per multiply-add: 2 forward and 4 backward for every matrix parameter, the head included and the lookup
        not; plus causal attention, 4 T D / 2 per layer forward and twice that backward. `recompute` adds a forward.
        Source: Kaplan et al. 2020, arXiv:2001.08361, section 2.1.
        """
        matrices = self.num_layers * 12 * self.width**2 + self.vocabulary * self.width
        forward = 2 * matrices + self.num_layers * 2 * seq * self.width
        return float(forward * (4 if recompute else 3))

    def logits_nbytes(self, *, batch: int, seq: int, itemsize: int) -> int:
        """Bytes that the loss of one micro-batch holds at its most: 2 V B T in the compute dtype and 3 V B T in fp32.

        Logits and their gradient in the compute dtype; in fp32 the upcast logits, their log-probabilities and gradient.
        """
        return batch * seq * self.vocabulary * (2 * itemsize + 3 * 4)


PRESETS: dict[str, GPTConfig] = {
    "tiny": GPTConfig(width=192, num_layers=4, num_heads=6),
    "small": GPTConfig(width=512, num_layers=10, num_heads=8),
    "base": GPTConfig(width=768, num_layers=18, num_heads=12),
    "medium": GPTConfig(width=1024, num_layers=28, num_heads=16),
    "large": GPTConfig(width=1600, num_layers=48, num_heads=25),
    "xl": GPTConfig(width=2560, num_layers=34, num_heads=40),
    "7b": GPTConfig(width=4096, num_layers=34, num_heads=32),
}


def preset(name: str, *, context: int | None = None, dropout: float | None = None) -> GPTConfig:
    """The configuration called `name`, with `context` and `dropout` replaced where given.

    Raises: ValueError if there is no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"No model called {name!r}; expected one of {', '.join(PRESETS)}.")
    config = PRESETS[name]
    if context is not None:
        config = replace(config, context=context)
    return config if dropout is None else replace(config, dropout=dropout)


class Rotary(nn.Module):
    """Rotary tables. Buffers, not persistent, fp32: `cos` and `sin`, each [context, K / 2]."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        half = config.width // config.num_heads // 2
        frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float32) / half)
        angle = torch.outer(torch.arange(config.context, dtype=torch.float32), frequency)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, seq: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Rows 0..seq-1 of both tables in `dtype`, each [T, K / 2]."""
        return self.cos[:seq].to(dtype), self.sin[:seq].to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + K/2]) of [B, H, T, K] by its position's angle; cos and sin are [T, K / 2]."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


class Attention(nn.Module):
    """Causal self-attention, [B, T, D] -> [B, T, D]."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, seq, width = x.shape
        qkv = self.qkv(x).view(batch, seq, 3, self.num_heads, width // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(
            rotate(query, cos, sin),
            rotate(key, cos, sin),
            value,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=True,
        )
        return self.out(mixed.transpose(1, 2).reshape(batch, seq, width))


class MLP(nn.Module):
    """Two linear maps around a GELU, [B, T, D] -> [B, T, D]."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, 4 * config.width, bias=False)
        self.down = nn.Linear(4 * config.width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    """One pre-norm transformer block, [B, T, D] -> [B, T, D]."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width, bias=False)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.width, bias=False)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), cos, sin))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class GPT(nn.Module):
    """Byte-level language model.

    `embed` is the input table, `blocks` the transformer, `norm` the last normalisation and `head` a linear map whose
    weight *is* `embed.weight`.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocabulary, config.width)
        self.rotary = Rotary(config)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.width, bias=False)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        self.head.weight = self.embed.weight
        self._initialise()

    def _initialise(self) -> None:
        """N(0, 0.02); the two maps that write into the residual stream by 1 / sqrt(2 L) less."""
        shrink = (2 * self.config.num_layers) ** -0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                into_residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
                nn.init.normal_(parameter, std=0.02 * (shrink if into_residual else 1.0))

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits, or the mean cross-entropy in nats per byte when `targets` is given.

        Args:
            ids: int64 [B, T], T at most `config.context`, values below `config.vocabulary`.
            targets: int64 [B, T], the byte that follows each position.
        Returns: [B, T, V] in the parameters' dtype, or an fp32 scalar.
        Raises: ValueError if T is larger than the context.
        """
        seq = ids.shape[1]
        if seq > self.config.context:
            raise ValueError(
                f"Sequence of {seq} bytes, but the rotary tables were built for {self.config.context}. "
                f"Build the model with GPTConfig(context={seq}) or pass a shorter window."
            )
        x = self.dropout(self.embed(ids))
        cos, sin = self.rotary(seq, x.dtype)
        for block in self.blocks:
            x = block(x, cos, sin)
        logits = self.head(self.norm(x))
        if targets is None:
            return logits
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
