"""Several forwards, losses and backwards, several engines, and what surrounds a call: the numbers of plain torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offload import SGD, OffloadConfig, OffloadEngine


class Net(nn.Module):
    """Three units with batch norm, a parameter that the root reads, a branch that some calls leave out."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Tanh())
        self.branch = nn.Linear(width, width)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, width))
        self.last = nn.Linear(width, 3)

    def forward(self, x: Tensor, branch: bool = True) -> Tensor:
        x = self.first(x)
        if branch:
            x = x + self.branch(x) * self.scale
        return self.last(x)


def data(step: int, num: int = 6) -> Tensor:
    return torch.randn(num, 4, generator=torch.Generator().manual_seed(step))


Step = Callable[[Any, nn.Module, int, Callable[..., Any]], Any]


def assert_as_torch(
    settings: dict[str, Any], one_step: Step, make: Callable[[], nn.Module] = Net, steps: int = 3, **more: Any
) -> None:
    """`one_step(call, module, step, backward)` makes forwards and backwards of a step; returns what to compare."""
    plain, model = make(), make()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)
    config = OffloadConfig(dtype=torch.float32, **{**settings, **more})
    with OffloadEngine(model, SGD(lr=0.05, momentum=0.9), config) as engine:
        for step in range(steps):
            theirs = one_step(plain, plain, step, Tensor.backward)
            optimizer.step()
            optimizer.zero_grad()
            ours = one_step(engine, model, step, engine.backward)
            engine.step()
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(engine.state_dict()[name], value, rtol=1e-5, atol=1e-6, msg=name)


def contrastive(call: Any, module: nn.Module, step: int, backward: Callable[..., Any]) -> Any:
    one, other = F.normalize(call(data(step))), F.normalize(call(data(step + 100)))
    loss = F.cross_entropy(one @ other.T / 0.2, torch.arange(6))
    backward(loss)
    return loss.detach()


def two_losses(call: Any, module: nn.Module, step: int, backward: Callable[..., Any]) -> Any:
    result = call(data(step))
    first, second = result[:, 0].square().mean(), result[:, 1:].abs().mean()
    backward(first, retain_graph=True)
    backward(second)
    return torch.stack([first, second]).detach()


def summed_losses(call: Any, module: nn.Module, step: int, backward: Callable[..., Any]) -> Any:
    loss = call(data(step)).square().mean() + call(data(step + 50), branch=False).abs().mean()
    backward(loss)
    return loss.detach()


def backward_later(call: Any, module: nn.Module, step: int, backward: Callable[..., Any]) -> Any:
    """Two forwards, then their backwards in the other order, with an evaluation in between."""
    first, second = call(data(step)).square().mean(), call(data(step + 50)).abs().mean()
    backward(second)
    module.eval()
    with torch.no_grad():
        seen = call(data(9))
    module.train()
    backward(first)
    return seen


def without_branch(call: Any, module: nn.Module, step: int, backward: Callable[..., Any]) -> Any:
    """In odd steps two parameters get no gradient."""
    loss = call(data(step), branch=step % 2 == 0).square().mean()
    backward(loss)
    return loss.detach()


PASSES = {
    "contrastive": (contrastive, 1),
    "two losses of one graph": (two_losses, 2),
    "one sum of two forwards": (summed_losses, 1),
    "backwards later": (backward_later, 2),
    "no gradient for some": (without_branch, 1),
}


@pytest.mark.parametrize("kept", [{}, {"activation_memory": 0}], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", PASSES)
def test_passes(settings: dict[str, Any], name: str, kept: dict[str, Any]) -> None:
    one_step, micro_batches = PASSES[name]
    assert_as_torch(settings, one_step, micro_batches=micro_batches, **kept)


def test_more_backwards_than_micro_batches_are_refused() -> None:
    with OffloadEngine(Net(), SGD(lr=0.1), OffloadConfig(device="cpu", dtype=torch.float32)) as engine:
        result = engine(data(0))
        engine.backward(result.sum(), retain_graph=True)
        with pytest.raises(
            RuntimeError, match=r"backward number 2 of a step with micro_batches=1.*micro_batches=\.\.\."
        ):
            engine.backward(result.square().sum())


@pytest.mark.parametrize("kept", [{}, {"activation_memory": 0}], ids=["kept", "recomputed"])
@pytest.mark.parametrize("way", ["grad", "inputs"])
def test_gradients_of_inputs_alone(settings: dict[str, Any], way: str, kept: dict[str, Any]) -> None:
    """Adversarial training: the first gradient goes to the input and to no parameter, and is no backward of a step."""

    def attack(call: Any, module: nn.Module, step: int, backward: Callable[..., Any]) -> Any:
        x = data(step).requires_grad_()
        loss = call(x).square().mean()
        if way == "grad":
            (gradient,) = torch.autograd.grad(loss, x)
        else:
            backward(loss, inputs=[x])
            gradient = x.grad
        adversarial = (x + 0.1 * gradient.sign()).detach()
        loss = call(adversarial).square().mean()
        backward(loss)
        return gradient

    assert_as_torch(settings, attack, **kept)


def test_gradient_of_the_input_and_then_of_the_parameters(settings: dict[str, Any]) -> None:
    """Both of one graph, which is retained."""

    def both(call: Any, module: nn.Module, step: int, backward: Callable[..., Any]) -> Any:
        x = data(step).requires_grad_()
        loss = call(x).square().mean()
        (gradient,) = torch.autograd.grad(loss, x, retain_graph=True)
        backward(loss + 0.1 * (x * gradient).sum())
        return x.grad

    assert_as_torch(settings, both)


def test_teacher_and_student(kit: SimpleNamespace, settings: dict[str, Any], tmp_path: Path) -> None:
    """Two engines in one process, each with a store of its own; the teacher is frozen, and streams."""

    def make(width: int) -> nn.Module:
        return Net(width)

    plain_teacher, plain_student = make(16).requires_grad_(False).eval(), make(8)
    optimizer = torch.optim.SGD(plain_student.parameters(), lr=0.05)
    config = {"dtype": torch.float32, **settings}
    other = {**config, "nvme": tmp_path / "teacher"} if "nvme" in config else config
    teacher_model = make(16).requires_grad_(False).eval()
    with (
        OffloadEngine(make(8), SGD(lr=0.05), OffloadConfig(**config)) as student,
        OffloadEngine(teacher_model, SGD(lr=0.05), OffloadConfig(**other)) as teacher,
    ):
        for step in range(3):
            with torch.no_grad():
                target, ours = plain_teacher(data(step)), teacher(data(step))
            torch.testing.assert_close(ours, target)
            loss = F.mse_loss(plain_student(data(step)), target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            mine = F.mse_loss(student(data(step)), ours)
            student.backward(mine)
            student.step()
            torch.testing.assert_close(mine, loss)
        # A frozen critic passes gradients through to the student that it judges.
        x = data(7)
        critic = nn.Linear(3, 4)
        plain_teacher(critic(plain_student(x))).square().mean().backward()
        student.backward(teacher(critic(student(x))).square().mean())
        with student.gather("*") as parameters:
            for name, parameter in plain_student.named_parameters():
                torch.testing.assert_close(parameters[name].grad, parameter.grad, rtol=1e-4, atol=1e-6)


def test_a_call_of_the_module_is_a_pass_of_the_engine(settings: dict[str, Any]) -> None:
    """Copies that the root read in an evaluation end with it, the order of use is learned, and time is not a step's."""
    with OffloadEngine(Net(), SGD(lr=0.05), OffloadConfig(dtype=torch.float32, **settings)) as engine:
        model = engine.module
        with torch.no_grad():
            model(data(0))
        assert engine.memory.private_nbytes == 0
        assert engine._order._kind == "eval" and engine._record._since_s is None
        model(data(0)).sum().backward()
        assert engine._order._kind == "train" and engine._record._since_s is not None
        engine.step()


# -- what surrounds a call


@pytest.mark.parametrize("kept", [{}, {"activation_memory": 0}], ids=["kept", "recomputed"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_modes_between_steps(settings: dict[str, Any], mode: Any, kept: dict[str, Any]) -> None:
    def one_step(call: Any, module: nn.Module, step: int, backward: Callable[..., Any]) -> Any:
        with mode():
            seen = call(data(9)).clone()
        backward(call(data(step)).square().mean())
        return seen

    assert_as_torch(settings, one_step, **kept)


@pytest.mark.parametrize("kept", [{}, {"activation_memory": 0}], ids=["kept", "recomputed"])
def test_autocast_around_the_call(settings: dict[str, Any], kept: dict[str, Any]) -> None:
    """Also where backward runs outside of it."""

    def one_step(call: Any, module: nn.Module, step: int, backward: Callable[..., Any]) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            result = call(data(step))
        assert result.dtype == torch.bfloat16
        backward(result.float().square().mean())
        return result.detach()

    assert_as_torch(settings, one_step, **kept)


HOW_COMPILED = ("wrapped before", "in place before", "wrapped after", "in place after", "whole", "engine")
COMPILED = [
    *((how, "eager") for how in HOW_COMPILED),
    ("wrapped before", "aot_eager"),
    *(pytest.param(how, "aot_eager", marks=pytest.mark.slow) for how in HOW_COMPILED[1:]),
    *(pytest.param(how, "inductor", marks=pytest.mark.slow) for how in HOW_COMPILED),
]


@pytest.mark.parametrize(("how", "backend"), COMPILED)
def test_compiled_blocks(how: str, backend: str) -> None:
    plain, model = Net(), Net()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05)
    torch._dynamo.reset()

    def compile_blocks() -> None:
        for name in ("first", "branch"):
            if how.startswith("wrapped"):
                setattr(model, name, torch.compile(getattr(model, name), backend=backend))
            else:
                getattr(model, name).compile(backend=backend)

    if how.endswith("before"):
        compile_blocks()
    with OffloadEngine(model, SGD(lr=0.05), OffloadConfig(device="cpu", dtype=torch.float32)) as engine:
        call: Any = engine
        if how.endswith("after"):
            compile_blocks()
        elif how in ("whole", "engine"):
            call = torch.compile(model if how == "whole" else engine, backend=backend)
        for step in range(2):
            loss = call(data(step)).square().mean()
            engine.backward(loss)
            engine.step()
            expected = plain(data(step)).square().mean()
            expected.backward()
            optimizer.step()
            optimizer.zero_grad()
            torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        values = {name.replace("_orig_mod.", ""): value for name, value in engine.state_dict().items()}
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(values[name], value, rtol=1e-5, atol=1e-6, msg=name)
    torch._dynamo.reset()


def test_compiled_block_is_compiled_inside_of_the_engine() -> None:
    graphs: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    model = Net()
    model.branch = torch.compile(model.branch, backend=backend)
    with OffloadEngine(model, SGD(lr=0.05), OffloadConfig(device="cpu", dtype=torch.float32)) as engine:
        engine.backward(engine(data(0)).sum())
        engine.step()
        engine.backward(engine(data(0)).sum())
        engine.step()
    assert 1 <= len(graphs) <= 3, "the block's own code is traced, and nothing of the engine's"
    torch._dynamo.reset()


def test_functional_call_with_buffers_alone() -> None:
    plain, model = Net().eval(), Net().eval()
    other = {"first.1.running_mean": torch.ones(8)}
    with OffloadEngine(model, SGD(lr=0.05), OffloadConfig(device="cpu", dtype=torch.float32)), torch.no_grad():
        ours = torch.func.functional_call(model, other, data(0))
        torch.testing.assert_close(ours, torch.func.functional_call(plain, other, data(0)))
