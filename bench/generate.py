"""Text from a byte-level model: one byte at a time, sampled with a seeded generator."""

import time
from collections.abc import Callable

import torch
from torch import Tensor


@torch.no_grad()
def generate(
    model: Callable[[Tensor], Tensor],
    prompt: bytes,
    *,
    num_bytes: int,
    context: int,
    temperature: float = 0.8,
    seed: int = 0,
    device: torch.device | str = "cpu",
    limit_s: float | None = None,
) -> bytes:
    """Continue `prompt` by up to `num_bytes` bytes.

    The whole window is computed anew for each byte, which is what an engine or a plain module can both do: an engine
    whose parameters rest on NVMe therefore reads them once per byte. Put the model in evaluation mode first.

    Args:
        model: module or engine; int64 [1, T] -> logits [1, T, 256].
        prompt: at least one byte; only the last `context` bytes are seen.
        context: longest T that the model accepts.
        temperature: logits are divided by it; 0 takes the likeliest byte.
        seed: of the sampling, which runs on the CPU so that the bytes do not depend on the device's generator.
        device: where the model wants its input.
        limit_s: stop after this many seconds, however few bytes there are by then.
    Returns: the new bytes, without the prompt.
    Raises: ValueError if the prompt is empty or the temperature is negative.
    """
    if not prompt:
        raise ValueError("The prompt is empty, expected at least one byte to continue. Pass, for example, b'\\n'.")
    if temperature < 0:
        raise ValueError(f"Temperature is {temperature}, expected 0 (likeliest byte) or more.")
    generator = torch.Generator().manual_seed(seed)
    text = bytearray(prompt)
    began = time.monotonic()
    for _ in range(num_bytes):
        ids = torch.tensor([list(text[-context:])], dtype=torch.int64, device=device)
        text.append(_sample(model(ids)[0, -1], temperature, generator))
        if limit_s is not None and time.monotonic() - began > limit_s:
            break
    return bytes(text[len(prompt) :])


def _sample(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    logits = logits.float().cpu()
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial(torch.softmax(logits / temperature, dim=0), 1, generator=generator))
