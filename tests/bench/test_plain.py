"""The loop that the engine is compared with does what a careful plain torch loop does, bit for bit."""

import copy

import torch

from offload.bench.models.gpt import GPT, GPTConfig
from offload.bench.plain import PlainTrainer

CONFIG = GPTConfig(width=32, num_layers=2, num_heads=4, context=16)


def batches(num: int) -> list[torch.Tensor]:
    draws = torch.Generator().manual_seed(1)
    return [torch.randint(0, 256, (2, 17), generator=draws) for _ in range(num)]


def test_float32_equals_torch_adamw() -> None:
    torch.manual_seed(0)
    model = GPT(CONFIG)
    twin = copy.deepcopy(model)
    trainer = PlainTrainer(model, lr=1e-3, weight_decay=0.1, dtype=torch.float32, device="cpu")
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-3, weight_decay=0.1, fused=True)
    for ids in batches(4):
        loss = twin(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert trainer.step(ids[:, :-1], ids[:, 1:]) == loss.item()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_bfloat16_keeps_fp32_masters_and_a_tied_head() -> None:
    torch.manual_seed(0)
    model = GPT(CONFIG)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    trainer = PlainTrainer(model, lr=1e-6, weight_decay=0.0, dtype=torch.bfloat16, device="cpu")
    for ids in batches(2):
        trainer.step(ids[:, :-1], ids[:, 1:])
    assert model.head.weight is model.embed.weight
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}
    changed = 0
    for working, master, start in zip(model.parameters(), trainer.masters, before, strict=True):
        assert working.dtype == torch.bfloat16
        assert master.dtype == torch.float32
        assert torch.equal(working, master.bfloat16())
        changed += int((master != start).sum())
    # steps of 1e-6 vanish in bfloat16 for most weights: only a master can have summed them
    assert changed > 0.9 * CONFIG.num_parameters


def test_recomputation_changes_no_bit() -> None:
    torch.manual_seed(0)
    model = GPT(CONFIG)
    twin = copy.deepcopy(model)
    keeping = PlainTrainer(model, lr=1e-3, weight_decay=0.1, dtype=torch.float32, device="cpu")
    recomputing = PlainTrainer(twin, lr=1e-3, weight_decay=0.1, dtype=torch.float32, device="cpu", recompute=True)
    for ids in batches(3):
        assert keeping.step(ids[:, :-1], ids[:, 1:]) == recomputing.step(ids[:, :-1], ids[:, 1:])
