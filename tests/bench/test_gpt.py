"""The bench model: parameter counts, tied head, causality, and what recomputed formulas say about it."""

import pytest
import torch

from offload.bench.models.gpt import GPT, PRESETS, GPTConfig, preset

# V D + D + L (12 D^2 + 2 D), worked out by hand for D = 192, 512, 768, 1024, 1600, 2560, 4096
NUM_PARAMETERS = {
    "tiny": 1_820_352,
    "small": 31_599_104,
    "base": 127_627_008,
    "medium": 352_642_048,
    "large": 1_475_124_800,
    "xl": 2_674_700_800,
    "7b": 6_846_435_328,
}
CONFIG = GPTConfig(width=32, num_layers=2, num_heads=4, context=16)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_has_the_parameters_that_the_formula_says(name: str) -> None:
    with torch.device("meta"):
        model = GPT(preset(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == NUM_PARAMETERS[name]
    assert preset(name).num_parameters == NUM_PARAMETERS[name]


def test_head_is_the_embedding() -> None:
    model = GPT(CONFIG)
    assert model.head.weight is model.embed.weight
    assert "head.weight" not in dict(model.named_parameters())
    model(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.int64)).backward()
    assert model.embed.weight.grad is not None
    assert int((model.embed.weight.grad.norm(dim=1) > 0).sum()) == 256  # the head's gradient reaches every row


def test_loss_is_the_cross_entropy_of_the_logits() -> None:
    torch.manual_seed(0)
    model = GPT(CONFIG)
    ids = torch.randint(0, 256, (3, 17))
    logits = model(ids[:, :-1])
    assert logits.shape == (3, 16, 256)
    wanted = -logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).mean()
    torch.testing.assert_close(model(ids[:, :-1], ids[:, 1:]), wanted)


def test_untrained_loss_is_near_that_of_a_uniform_guess() -> None:
    torch.manual_seed(0)
    loss = GPT(CONFIG)(torch.randint(0, 256, (4, 16)), torch.randint(0, 256, (4, 16)))
    assert abs(loss.item() - 5.545) < 0.1  # ln 256


def test_a_byte_does_not_see_the_future() -> None:
    torch.manual_seed(0)
    model = GPT(CONFIG)
    ids = torch.randint(0, 256, (1, 16))
    changed = ids.clone()
    changed[0, 9] = (changed[0, 9] + 1) % 256
    before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert (before[:, 9:] != after[:, 9:]).any(dim=-1).all()


def test_order_of_bytes_matters() -> None:
    """Without positions attention would see a set: the last byte's logits would not change with the order."""
    torch.manual_seed(0)
    model = GPT(CONFIG)
    ids = torch.arange(10, 26)[None]
    swapped = ids.clone()
    swapped[0, [2, 11]] = swapped[0, [11, 2]]
    assert (model(ids)[0, -1] - model(swapped)[0, -1]).abs().max() > 1e-4


def test_rotary_tables_are_fp32_and_not_saved() -> None:
    model = GPT(CONFIG)
    assert {name: buffer.dtype for name, buffer in model.named_buffers()} == {
        "rotary.cos": torch.float32,
        "rotary.sin": torch.float32,
    }
    assert not any("rotary" in name for name in model.state_dict())


def test_flops_count_every_matrix_three_times_twice() -> None:
    matrices = 2 * 12 * 32 * 32 + 256 * 32
    attention = 2 * 2 * 16 * 32
    assert CONFIG.flops_per_token(16) == 3 * (2 * matrices + attention)
    assert CONFIG.flops_per_token(16, recompute=True) == 4 * (2 * matrices + attention)


def test_logits_bytes_count_both_dtypes() -> None:
    assert CONFIG.logits_nbytes(batch=2, seq=8, itemsize=2) == 2 * 8 * 256 * (2 + 2 + 4 + 4 + 4)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"width": 36}, "multiple of 8"), ({"num_layers": 0}, "num_layers is 0"), ({"dropout": 1.0}, "dropout is 1.0")],
)
def test_impossible_shape_is_refused(change: dict[str, float], words: str) -> None:
    shape: dict[str, float] = {"width": 32, "num_layers": 2, "num_heads": 4}
    with pytest.raises(ValueError, match=words):
        GPTConfig(**{**shape, **change})  # type: ignore[arg-type]


def test_sequence_beyond_the_context_is_refused() -> None:
    with pytest.raises(ValueError, match=r"17 bytes.*16.*context=17"):
        GPT(CONFIG)(torch.zeros(1, 17, dtype=torch.int64))


def test_unknown_preset_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'huge'.*tiny, small, base"):
        preset("huge")
