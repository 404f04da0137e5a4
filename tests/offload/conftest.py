"""What the tests of the engine share: a small GPT, data, plain runs, engine runs, comparisons of bits."""

from __future__ import annotations

import copy
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offload import SGD, BudgetTooSmall, OffloadConfig, OffloadEngine
from offload.access import HostParameter
from offload.optimizers import OptimizerSpec
from offload.scheduler.devices import FakeDevice

Batch = tuple[Tensor, Tensor]


class Block(nn.Module):
    """A pre-norm transformer block. Shapes: B batch, T positions, C width."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x_BTC: Tensor) -> Tensor:
        batch, length, width = x_BTC.shape
        q, k, v = (
            part.view(batch, length, self.num_heads, -1).transpose(1, 2)
            for part in self.qkv(self.norm1(x_BTC)).chunk(3, dim=-1)
        )
        drop = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=drop)
        mixed = self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        x_BTC = x_BTC + F.dropout(mixed, self.dropout, self.training)
        hidden = self.down(F.gelu(self.up(self.norm2(x_BTC))))
        return x_BTC + F.dropout(hidden, self.dropout, self.training)


class TinyGPT(nn.Module):
    """A causal language model with GPT-2's initialisation (std 0.02), maybe with a tied head and a frozen block."""

    def __init__(
        self,
        vocab: int = 61,
        width: int = 32,
        depth: int = 2,
        num_heads: int = 2,
        length: int = 16,
        dropout: float = 0.0,
        tied: bool = True,
        frozen: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.tokens = nn.Embedding(vocab, width)
            self.positions = nn.Embedding(length, width)
            self.blocks = nn.ModuleList(Block(width, num_heads, dropout) for _ in range(depth))
            self.norm = nn.LayerNorm(width)
            self.head = nn.Linear(width, vocab, bias=False)
            for part in self.modules():
                if isinstance(part, (nn.Linear, nn.Embedding)):
                    nn.init.normal_(part.weight, std=0.02)
                if isinstance(part, nn.Linear) and part.bias is not None:
                    nn.init.zeros_(part.bias)
        if tied:
            self.head.weight = self.tokens.weight
        if frozen:
            self.blocks[0].requires_grad_(False)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        """Mean cross entropy (fp32), or logits [B, T, vocab] without targets."""
        x_BTC = self.tokens(tokens_BT) + self.positions(torch.arange(tokens_BT.shape[1]))
        for block in self.blocks:
            x_BTC = block(x_BTC)
        logits = self.head(self.norm(x_BTC))
        if targets_BT is None:
            return logits
        return F.cross_entropy(logits.float().flatten(0, 1), targets_BT.flatten())


def batches(num: int, vocab: int = 61, batch: int = 4, length: int = 16, seed: int = 7) -> list[Batch]:
    """`num` pairs (tokens, next tokens), int64 [batch, length]."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(vocab, (batch, length + 1), generator=generator) for _ in range(num)]
    return [(row[:, :-1].contiguous(), row[:, 1:].contiguous()) for row in rows]


@dataclass
class Run:
    """What a training run leaves: one loss per backward, one norm per step, first gradients and last values by name."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    first_grads: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    state: dict[str, HostParameter] = field(default_factory=dict)


def plain_run(
    model: nn.Module,
    make_optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
    data: Sequence[Batch],
    micro_batches: int = 1,
    clip: float | None = None,
    seed: int = 3,
) -> Run:
    """The loop that anybody writes in plain torch. `model` is trained in place."""
    run = Run()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(trainable)
    torch.manual_seed(seed)
    for first in range(0, len(data), micro_batches):
        for x, y in data[first : first + micro_batches]:
            loss = model(x, y)
            loss.backward()
            run.losses.append(float(loss.detach()))
        if not run.first_grads:
            run.first_grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        if clip is not None:
            run.norms.append(float(nn.utils.clip_grad_norm_(trainable, clip)))
        optimizer.step()
        optimizer.zero_grad()
    run.weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return run


def engine_run(
    model: nn.Module,
    spec: OptimizerSpec,
    config: OffloadConfig,
    data: Sequence[Batch],
    seed: int = 3,
    check: Callable[[OffloadEngine], None] | None = None,
) -> Run:
    """The same loop through an engine, which is closed at the end. `check` looks at the engine before that."""
    run = Run()
    with OffloadEngine(model, spec, config) as engine:
        torch.manual_seed(seed)
        for first in range(0, len(data), config.micro_batches):
            for x, y in data[first : first + config.micro_batches]:
                loss = engine(x, y)
                engine.backward(loss)
                run.losses.append(float(loss.detach()))
            if not run.first_grads:
                with engine.gather("*") as parameters:
                    run.first_grads = {n: p.grad for n, p in parameters.items() if p.grad is not None}
            run.norms.append(engine.step().grad_norm)
        run.state = state_of(engine)
        run.weights = {name: host.value for name, host in run.state.items()}
        if check is not None:
            check(engine)
    return run


def state_of(engine: OffloadEngine) -> dict[str, HostParameter]:
    """Every parameter's master, states, step count and gradient, in host memory."""
    with engine.gather("*") as parameters:
        return dict(parameters)


def bits(tensor: Tensor) -> bytes:
    """The bytes of a tensor: NaN equals itself, and -0.0 is not 0.0."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same_state(one: Mapping[str, HostParameter], other: Mapping[str, HostParameter]) -> None:
    """Masters, states, steps and gradients agree in every bit."""
    assert one.keys() == other.keys()
    for name in one:
        a, b = one[name], other[name]
        assert bits(a.value) == bits(b.value), f"master of {name}"
        assert a.step == b.step, f"step count of {name}"
        assert a.states.keys() == b.states.keys()
        for kind in a.states:
            assert bits(a.states[kind]) == bits(b.states[kind]), f"{kind} of {name}"
        assert (a.grad is None) == (b.grad is None), f"presence of a gradient of {name}"
        if a.grad is not None and b.grad is not None:
            assert bits(a.grad) == bits(b.grad), f"gradient of {name}"


def assert_same_run(one: Run, other: Run) -> None:
    """Losses, norms, first gradients, masters and states agree in every bit."""
    assert one.losses == other.losses
    assert one.norms == other.norms
    assert one.first_grads.keys() == other.first_grads.keys()
    for name in one.first_grads:
        assert bits(one.first_grads[name]) == bits(other.first_grads[name]), f"first gradient of {name}"
    assert_same_state(one.state, other.state)


def assert_same_grads(ours: Mapping[str, Tensor], torchs: Mapping[str, Tensor]) -> None:
    """Every gradient that torch has, and no other, agrees in every bit. Tied names beyond the first may be extra."""
    assert torchs.keys() <= ours.keys()
    for name, gradient in torchs.items():
        assert bits(ours[name]) == bits(gradient), f"gradient of {name}"


def relative_difference(
    weights: Mapping[str, Tensor], reference: Mapping[str, Tensor], start: Mapping[str, Tensor]
) -> float:
    """Norm of (weights - reference) over the norm of the reference's whole update (reference - start)."""
    gap = sum(float((weights[n].double() - reference[n].double()).square().sum()) for n in reference)
    update = sum(float((reference[n].double() - start[n].double()).square().sum()) for n in reference)
    return (gap / update) ** 0.5


def smallest_budget(make: Callable[[int], Any]) -> int:
    """The smallest budget in bytes with which `make(budget)` works, found as a user would: from what refusals say."""
    budget = 1
    for _ in range(5):
        try:
            make(budget)
        except BudgetTooSmall as refusal:
            match = re.search(r"that works is (\d+) bytes", str(refusal))
            assert match, str(refusal)
            budget = int(match[1])
        else:
            return budget
    raise AssertionError(f"five refusals in a row, last with {budget} bytes")


def train_both(
    make_model: Callable[[], nn.Module],
    loss_of: Callable[[Callable[..., Any], nn.Module, int], Tensor],
    settings: Mapping[str, Any],
    num_steps: int = 3,
    look: Callable[[OffloadEngine, nn.Module], None] | None = None,
) -> tuple[nn.Module, Run]:
    """Train `make_model()` in plain torch and through an engine (fp32, SGD with momentum), and require parity.

    SGD, because Adam divides by the gradient: where its true value is zero (the bias of a key or before a norm), Adam
    makes full steps of rounding noise.

    The first loss and first gradients must agree in every bit, also in which parameters have one; later losses to 1e-6
    relative; the weights' difference must be 1e-3 of the update; buffers must agree to 1e-6.

    Args:
        loss_of: `call, module, step -> loss`; `call` is what to call in place of the module.
        look: called with (engine, the plainly trained module) before the engine is closed.
    """
    plain = make_model()
    wrapped = copy.deepcopy(plain)
    start = {name: p.detach().clone() for name, p in plain.named_parameters()}
    optimizer = torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    expected = Run()
    torch.manual_seed(5)
    for step in range(num_steps):
        loss = loss_of(plain, plain, step)
        loss.backward()
        expected.losses.append(float(loss.detach()))
        if not step:
            expected.first_grads = {n: p.grad.clone() for n, p in plain.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
    run = Run()
    config = OffloadConfig(dtype=torch.float32, **settings)
    with OffloadEngine(wrapped, SGD(lr=0.05, momentum=0.9), config) as engine:
        torch.manual_seed(5)
        for step in range(num_steps):
            loss = loss_of(engine, wrapped, step)
            engine.backward(loss)
            run.losses.append(float(loss.detach()))
            if not step:
                with engine.gather("*") as parameters:
                    known = dict(wrapped.named_parameters())
                    run.first_grads = {n: p.grad for n, p in parameters.items() if p.grad is not None and n in known}
            engine.step()
        run.state = state_of(engine)
        buffers = {name: buffer.clone() for name, buffer in wrapped.named_buffers()}
        if look is not None:
            look(engine, plain)
    assert run.losses[0] == expected.losses[0]
    assert run.first_grads.keys() == expected.first_grads.keys()
    assert_same_grads(run.first_grads, expected.first_grads)
    assert run.losses == pytest.approx(expected.losses, rel=1e-6, abs=1e-12)
    trained = {name: p.detach() for name, p in plain.named_parameters() if p.requires_grad}
    values = {name: host.value for name, host in run.state.items()}
    assert relative_difference(values, trained, start) <= 1e-3
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(buffers[name], buffer, rtol=1e-6, atol=1e-7)
    return plain, run


ALL_NVME = {"param": "nvme", "states": "nvme", "grad": "nvme"}


def run_script(folder: Path, source: str, *args: str, timeout_s: float = 100) -> subprocess.CompletedProcess[str]:
    """Run `source` in an interpreter of its own, from `folder`: sys.path[0] must not be the project's root."""
    script = folder / "script.py"
    script.write_text(source)
    return subprocess.run(
        [sys.executable, str(script), *args],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        cwd=folder,
        check=False,
        preexec_fn=listen_to_interrupts,
    )


def listen_to_interrupts() -> None:
    """For a child: a suite that runs in the background ignores Ctrl-C, and a child inherits that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture(scope="session")
def kit() -> SimpleNamespace:
    """The helpers above, as attributes (test modules cannot import each other)."""
    return SimpleNamespace(
        ALL_NVME=ALL_NVME,
        Block=Block,
        TinyGPT=TinyGPT,
        Run=Run,
        batches=batches,
        plain_run=plain_run,
        engine_run=engine_run,
        state_of=state_of,
        bits=bits,
        assert_same_state=assert_same_state,
        assert_same_run=assert_same_run,
        assert_same_grads=assert_same_grads,
        relative_difference=relative_difference,
        smallest_budget=smallest_budget,
        clone=copy.deepcopy,
        run_script=run_script,
        train_both=train_both,
    )


@pytest.fixture(params=["memory", "nvme", "fake"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """Settings of three placements that share no code path for bytes."""
    if request.param == "memory":
        return {"device": "cpu"}
    if request.param == "nvme":
        return {
            "device": "cpu",
            "nvme": tmp_path / "nvme",
            "homes": ALL_NVME,
            "host_memory": "64MiB",
            "overwrite": True,
        }
    return {"device": FakeDevice(seed=1, max_delay_s=3e-4), "device_memory": "1MiB"}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models compute on one thread: two of them mostly wait for each other, and longer on a busy machine.

    Engines fix the number of compute threads, so every test starts from the same; where two matter, a test says so.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
