"""How a model is called: from other threads, without gradients, under autocast and inference mode, again and again."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offload import SGD, AdamW, OffloadConfig, OffloadEngine

FP32 = {"dtype": torch.float32}


class HeadTiedByHand(nn.Module):
    """A parent that computes with a child's weight: reads outside of any unit's call."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.Tanh())

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.block(self.embed(tokens)), self.embed.weight)


def make_tied() -> HeadTiedByHand:
    torch.manual_seed(2)
    return HeadTiedByHand()


TOKENS = torch.arange(12) % 11


def in_thread(work: Any) -> None:
    """Run `work()` in another thread; raises what it raises."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    if errors:
        raise errors[0]


def test_backward_from_another_thread(kit: SimpleNamespace, settings: dict[str, Any]) -> None:
    """An accelerator's autograd runs backward in threads of its own."""
    data = kit.batches(6)
    config = OffloadConfig(**FP32, micro_batches=2, **settings)
    expected = kit.engine_run(kit.TinyGPT(dropout=0.1), AdamW(lr=1e-2), OffloadConfig(**FP32, micro_batches=2), data)
    losses: list[float] = []
    with OffloadEngine(kit.TinyGPT(dropout=0.1), AdamW(lr=1e-2), config) as engine:
        torch.manual_seed(3)
        for first in range(0, len(data), 2):
            for x, y in data[first : first + 2]:
                loss = engine(x, y)
                in_thread(loss.backward if first else lambda loss=loss: engine.backward(loss))
                losses.append(float(loss.detach()))
            engine.step()
        kit.assert_same_state(kit.state_of(engine), expected.state)
    assert losses == expected.losses


def test_whole_training_from_another_thread(kit: SimpleNamespace, settings: dict[str, Any]) -> None:
    data = kit.batches(3)
    expected = kit.engine_run(kit.TinyGPT(), AdamW(lr=1e-2), OffloadConfig(**FP32), data)
    runs: list[Any] = []

    def work() -> None:
        runs.append(kit.engine_run(kit.TinyGPT(), AdamW(lr=1e-2), OffloadConfig(**FP32, **settings), data))

    in_thread(work)
    kit.assert_same_run(runs[0], expected)


def without(mode: str) -> Any:
    return torch.inference_mode() if mode == "inference_mode" else torch.no_grad()


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
def test_evaluation_between_steps_changes_nothing(kit: SimpleNamespace, settings: dict[str, Any], mode: str) -> None:
    """Evaluation before, between and inside an accumulation: torch's numbers, and training as without."""
    data = kit.batches(4)
    expected = kit.engine_run(kit.TinyGPT(), AdamW(lr=1e-2), OffloadConfig(**FP32, micro_batches=2), data)
    config = OffloadConfig(**FP32, micro_batches=2, **settings)
    with OffloadEngine(kit.TinyGPT(), AdamW(lr=1e-2), config) as engine:

        def evaluate() -> Tensor:
            engine.eval()
            with without(mode):
                logits = engine(data[0][0])
            engine.train()
            assert not logits.requires_grad
            return logits

        with torch.no_grad():
            plain = kit.TinyGPT().eval()(data[0][0])
        assert kit.bits(evaluate()) == kit.bits(plain)
        for first in (0, 2):
            for x, y in data[first : first + 2]:
                engine.backward(engine(x, y))
                evaluate()
            engine.step()
            evaluate()
        kit.assert_same_state(kit.state_of(engine), expected.state)


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
def test_weights_read_in_evaluation_serve_a_later_backward(
    kit: SimpleNamespace, settings: dict[str, Any], mode: str
) -> None:
    """A view made inside inference mode raises in a later backward, so parameters must be fetched outside of it."""
    plain = make_tied()
    loss = F.cross_entropy(plain(TOKENS), TOKENS)
    loss.backward()
    with OffloadEngine(make_tied(), SGD(), OffloadConfig(**FP32, **settings)) as engine:
        with without(mode):
            engine(TOKENS)
            assert engine.module.embed.weight.isfinite().all()
        ours = F.cross_entropy(engine(TOKENS), TOKENS)
        with without(mode):
            engine(TOKENS)
        engine.backward(ours)
        assert float(ours.detach()) == float(loss.detach())
        with engine.gather("*") as parameters:
            for name, parameter in plain.named_parameters():
                assert kit.bits(parameters[name].grad) == kit.bits(parameter.grad), name


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
def test_generation(kit: SimpleNamespace, settings: dict[str, Any], mode: str) -> None:
    def generate(call: Any) -> list[int]:
        tokens = torch.tensor([[1, 2, 3]])
        with without(mode):
            for _ in range(8):
                tokens = torch.cat([tokens, call(tokens)[:, -1:].argmax(-1)], dim=1)
        return tokens[0].tolist()

    expected = generate(kit.TinyGPT().eval())
    with OffloadEngine(kit.TinyGPT(), SGD(), OffloadConfig(**FP32, **settings)) as engine:
        engine.eval()
        assert generate(engine) == expected
        assert engine.memory.private_nbytes == 0
        assert engine.memory.boundaries_peak_nbytes == 0


def test_graph_that_is_dropped_leaves_nothing_behind(kit: SimpleNamespace, settings: dict[str, Any]) -> None:
    """Forwards whose loss is thrown away: the next step's gradients are those of the next backward alone."""
    data = kit.batches(4)
    plain = kit.TinyGPT()
    plain(*data[3]).backward()
    with OffloadEngine(kit.TinyGPT(), SGD(), OffloadConfig(**FP32, micro_batches=2, **settings)) as engine:
        for x, y in data[:3]:
            engine(x, y)
        engine.backward(engine(*data[3]))
        with engine.gather("*") as parameters:
            for name, parameter in plain.named_parameters():
                assert kit.bits(parameters[name].grad) == kit.bits(parameter.grad), name
        engine.step(partial=True)


def test_autocast(kit: SimpleNamespace, settings: dict[str, Any]) -> None:
    """Autocast around forward only, as is usual; the recomputation in backward must cast the same."""

    def make() -> nn.Module:
        torch.manual_seed(4)
        return nn.Sequential(nn.Sequential(nn.Linear(8, 16), nn.GELU()), nn.LayerNorm(16), nn.Linear(16, 4))

    def loss_of(call: Any, module: nn.Module, step: int) -> Tensor:
        x = torch.randn(3, 8, generator=torch.Generator().manual_seed(step))
        with torch.autocast("cpu", torch.bfloat16):
            out = call(x)
        assert out.dtype == torch.bfloat16
        return out.float().square().mean()

    # bf16 rounds the forward: a last bit of a weight can move a product by 2**-8, so losses are not held to 1e-6 here.
    plain = make()
    expected = loss_of(plain, plain, 0)
    expected.backward()
    with OffloadEngine(make(), SGD(), OffloadConfig(**FP32, **settings)) as engine:
        loss = loss_of(engine, engine.module, 0)
        engine.backward(loss)
        assert float(loss.detach()) == float(expected.detach())
        with engine.gather("*") as parameters:
            for name, parameter in plain.named_parameters():
                assert kit.bits(parameters[name].grad) == kit.bits(parameter.grad), name


def test_parameters_compute_in_the_chosen_dtype(kit: SimpleNamespace, settings: dict[str, Any]) -> None:
    """Parameters are cast to `dtype`, but for `keep_fp32` and what a Hugging Face class declares; buffers stay."""

    class Mixed(nn.Module):
        _keep_in_fp32_modules = ("router",)

        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.norm = nn.BatchNorm1d(4)
            self.router = nn.Linear(4, 4)
            self.register_buffer("table", torch.arange(4.0) / 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x.bfloat16()).float() + self.table
            return self.router(self.norm(x)).sum()

    seen: dict[str, torch.dtype] = {}
    model = Mixed()
    for name, part in model.named_modules():
        part.register_forward_pre_hook(
            lambda module, args, name=name: seen.update(
                {f"{name}.{key}": p.dtype for key, p in module.named_parameters(recurse=False)}
            )
        )
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    with OffloadEngine(model, SGD(), OffloadConfig(keep_fp32=["norm.*"], **settings)) as engine:
        engine.backward(engine(torch.ones(2, 4)))
        engine.step()
        assert model.table.dtype == torch.float32 and model.norm.running_mean.dtype == torch.float32
        assert {name: p.dtype for name, p in model.named_parameters()} == seen | {
            "norm.weight": torch.float32,
            "norm.bias": torch.float32,
        }
    assert seen == {
        "first.weight": torch.bfloat16,
        "first.bias": torch.bfloat16,
        "norm.weight": torch.float32,
        "norm.bias": torch.float32,
        "router.weight": torch.float32,
        "router.bias": torch.float32,
    }
    assert start.keys() == seen.keys()


def test_stateful_module_is_named(settings: dict[str, Any]) -> None:
    """A unit that computes something else the second time cannot be recomputed: an error, not wrong gradients."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.linear(x) * self.calls

    config = OffloadConfig(**FP32, activation_memory=0, **settings)
    with OffloadEngine(nn.Sequential(Counting(), nn.Linear(4, 1)), SGD(), config) as engine:
        loss = engine(torch.ones(1, 4)).sum()
        with pytest.raises(RuntimeError, match=r"'0' computed something else .* use_cache=False"):
            engine.backward(loss)
        with pytest.raises(RuntimeError, match=r"zero_grad"):
            engine.step()
        engine.optimizer.zero_grad()


def test_input_changed_in_place_is_named(settings: dict[str, Any]) -> None:
    class Rude(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x.add_(1.0)
            return self.linear(x)

    with (
        OffloadEngine(nn.Sequential(Rude(), nn.Linear(4, 1)), SGD(), OffloadConfig(**FP32, **settings)) as engine,
        pytest.raises(RuntimeError, match=r"'0' changed one of its inputs in place"),
    ):
        engine(torch.ones(1, 4))


def test_training_flag_reaches_the_module(kit: SimpleNamespace) -> None:
    with OffloadEngine(kit.TinyGPT(), SGD(), OffloadConfig(**FP32)) as engine:
        assert engine.eval() is engine and not engine.module.training
        assert engine.train() is engine and engine.module.blocks[0].training
