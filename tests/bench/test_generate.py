"""Sampling: seeded, at its temperature, within its limits."""

import pytest
import torch

from offload.bench.generate import generate
from offload.bench.models.gpt import GPT, GPTConfig


class Counter(torch.nn.Module):
    """Says with certainty that the next byte is the last one plus one, and notes the window lengths it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.lengths: list[int] = []

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.lengths.append(ids.shape[1])
        return 1000.0 * torch.nn.functional.one_hot((ids + 1) % 256, 256).float()


def test_bytes_follow_the_model_and_the_window_stays_within_the_context() -> None:
    model = Counter()
    assert generate(model, b"ab", num_bytes=6, context=4) == b"cdefgh"
    assert model.lengths == [2, 3, 4, 4, 4, 4]


def test_the_same_seed_gives_the_same_bytes() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(width=32, num_layers=1, num_heads=2, context=16)).eval()
    first = generate(model, b"x", num_bytes=24, context=16, seed=5)
    assert first == generate(model, b"x", num_bytes=24, context=16, seed=5)
    assert first != generate(model, b"x", num_bytes=24, context=16, seed=6)


def test_temperature_zero_takes_the_likeliest_byte() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(width=32, num_layers=1, num_heads=2, context=16)).eval()
    wanted = int(model(torch.tensor([[120]]))[0, -1].argmax())
    assert generate(model, b"x", num_bytes=1, context=16, temperature=0, seed=1) == bytes([wanted])


def test_nothing_is_recorded_for_backward() -> None:
    seen = []

    def model(ids: torch.Tensor) -> torch.Tensor:
        seen.append(torch.is_grad_enabled())
        return torch.zeros(1, ids.shape[1], 256)

    generate(model, b"x", num_bytes=2, context=4)
    assert seen == [False, False]


def test_time_limit_of_zero_stops_after_one_byte() -> None:
    assert generate(Counter(), b"a", num_bytes=50, context=4, limit_s=0.0) == b"b"


@pytest.mark.parametrize(("prompt", "temperature", "words"), [(b"", 1.0, "prompt is empty"), (b"a", -1.0, "-1.0")])
def test_useless_request_is_refused(prompt: bytes, temperature: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        generate(Counter(), prompt, num_bytes=1, context=4, temperature=temperature)
