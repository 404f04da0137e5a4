"""One mistake costs one message: what was not touched by it stays usable."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from offload import AdamW, BudgetTooSmall, OffloadConfig, OffloadEngine, PlaceholderOverwritten


def build(**settings: object) -> OffloadEngine:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 1))
    config = {"device": "cpu", "dtype": torch.float32, "host_memory": "16MiB", **settings}
    return OffloadEngine(module, AdamW(lr=1e-2), OffloadConfig(**config))


def one_step(engine: OffloadEngine) -> float | None:
    engine.backward(engine(torch.ones(4, 16)).square().mean())
    return engine.step().loss


def test_an_edited_copy_is_named_and_the_others_stay_usable() -> None:
    with build() as engine, build() as healthy:
        first, second = engine.module[0], engine.module[1]
        with torch.no_grad():
            first.weight.add_(1.0)
            assert bool(second.weight.isfinite().all())
        engine.backward(engine(torch.ones(4, 16)).square().mean())
        with pytest.raises(PlaceholderOverwritten, match=r"0\.weight.*lost"):
            engine.step()
        engine.optimizer.zero_grad()
        assert [one_step(engine) for _ in range(3)] == [one_step(healthy) for _ in range(3)]


@pytest.mark.parametrize(
    "optimizer", [AdamW, torch.optim.AdamW([nn.Parameter(torch.zeros(1))])], ids=["class", "torch"]
)
def test_another_kind_of_optimizer_is_refused_with_the_mend(optimizer: object) -> None:
    with pytest.raises(ValueError, match=r"AdamW.*offload\.AdamW\(lr="):
        OffloadEngine(nn.Linear(2, 2), optimizer, OffloadConfig(device="cpu"))  # type: ignore[arg-type]


def test_a_bad_hyperparameter_changes_nothing() -> None:
    with build() as engine, build() as healthy:
        engine.backward(engine(torch.ones(4, 16)).square().mean())
        engine.optimizer.param_groups[0]["lr"] = -1.0
        with pytest.raises(ValueError, match=r"lr=-1\.0"):
            engine.step()
        engine.optimizer.param_groups[0]["lr"] = 1e-2
        losses = [engine.step().loss, one_step(engine)]
        assert losses == [one_step(healthy), one_step(healthy)]


def test_a_failed_backward_is_not_waited_for_by_later_ones() -> None:
    with build(micro_batches=2) as engine:
        loss = engine(torch.ones(4, 16)).square().mean()
        handle = engine.module[0].bias.register_hook(lambda gradient: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.backward(loss)
        handle.remove()
        del loss
        engine.optimizer.zero_grad()
        assert [engine._runtime.ledger.pending(unit) for unit in range(3)] == [False] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_smallest_budget_serves_a_shared_unit_and_several_backwards(
    kit: SimpleNamespace, tmp_path: Path, dtype: torch.dtype
) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(128, 128), nn.Tanh()) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(2):
                for block in self.blocks:
                    x = x + block(x)
            return x.float().square().mean()

    def wrap(budget: int) -> OffloadEngine:
        config = OffloadConfig(
            device="fake",
            host_memory=budget,
            nvme=tmp_path,
            homes={"param": "nvme", "states": "nvme", "grad": "nvme"},
            micro_batches=2,
            dtype=dtype,
            overwrite=True,
        )
        return OffloadEngine(Shared(), AdamW(), config)

    smallest = kit.smallest_budget(lambda budget: wrap(budget).close())
    with pytest.raises(BudgetTooSmall):
        wrap(smallest - 1)
    with wrap(smallest) as engine:
        for _ in range(2):
            for _ in range(2):
                engine.backward(engine(torch.ones(4, 128).to(dtype)))
            assert not engine.step().skipped


def test_nobody_fetches_a_unit_while_its_values_change() -> None:
    """An evaluation that asks for a unit in the middle of its update waits and gets the new values."""
    with build() as engine:
        unit = engine._parts.layouts[0].unit
        engine._loop.run(engine._residency.withdraw([unit]))
        got: list[torch.Tensor] = []

        def evaluate() -> None:
            with torch.no_grad():
                got.append(engine.module[0](torch.ones(1, 16)))

        reader = threading.Thread(target=evaluate)
        reader.start()
        reader.join(0.2)
        assert reader.is_alive(), "the fetch must wait until the values are whole"
        with torch.no_grad():
            engine._parts.homes[0]["param"].buffer.view(torch.float32).fill_(1.0)
        engine._loop.call_soon(engine._residency.admit, [unit])
        reader.join(10)
        assert torch.equal(got[0], torch.full((1, 16), 17.0))


def test_evaluation_leaves_no_record_and_no_time() -> None:
    with build() as engine:
        engine.eval()
        with torch.no_grad():
            for _ in range(50):
                engine(torch.ones(4, 16))
        spans, waits = engine._parts.lanes.trace.drain()
        assert [span for span in spans if span.kind == "param"] == []
        assert waits == []
        assert engine._record._compute._pairs == []
