"""What cannot work is refused in one sentence with the mend, before anything is changed, and training goes on."""

from __future__ import annotations

import copy
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offload import AdamW, OffloadConfig, OffloadEngine


class Net(nn.Module):
    """Units in a list, an embedding shared by name, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))
        self.head = nn.Linear(4, 4)
        self.register_buffer("shift", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x) + self.shift


X = torch.linspace(-1, 1, 12).reshape(3, 4)


@pytest.fixture
def engine() -> Iterator[OffloadEngine]:
    with OffloadEngine(Net(), AdamW(lr=1e-2), OffloadConfig(device="cpu", dtype=torch.float32)) as engine:
        yield engine


def create_graph(engine: OffloadEngine) -> None:
    engine.backward(engine(X).sum(), create_graph=True)


def penalty(engine: OffloadEngine) -> None:
    x = X.clone().requires_grad_()
    torch.autograd.grad(engine(x).sum(), x, create_graph=True)


def call_with_values(engine: OffloadEngine) -> Any:
    values = {name: torch.zeros(p.shape) for name, p in engine.module.named_parameters()}
    return torch.func.functional_call(engine.module, values, X)


def append_block(engine: OffloadEngine) -> None:
    engine.module.blocks.append(nn.Linear(4, 4))


def steal(engine: OffloadEngine) -> None:
    """A module of one's own with a parameter of the engine: it would compute with what stands in for it."""
    twin = nn.Linear(4, 4)
    twin.weight = engine.module.head.weight
    engine.module.head = twin


def assign(name: str, value: Any) -> Callable[[OffloadEngine], None]:
    return lambda engine: setattr(engine.module.head, name, value)


REFUSED: dict[str, tuple[Callable[[OffloadEngine], Any], str]] = {
    "create_graph": (create_graph, r"create_graph=True reached unit.*leave create_graph out"),
    "gradient penalty": (penalty, r"create_graph=True reached unit"),
    "vmap": (lambda e: torch.func.vmap(e)(X), r"torch.func transform.*engine.backward\(loss\)"),
    "func.grad": (lambda e: torch.func.grad(lambda x: e(x).sum())(X), r"torch.func transform"),
    "jacrev": (lambda e: torch.func.jacrev(e.module)(X), r"torch.func transform"),
    "functional_call": (call_with_values, r"functional_call does so too.*engine.gather\(..., write=True\)"),
    "parameter replaced": (assign("weight", nn.Parameter(torch.zeros(4, 4))), r"parameter 'weight' .*is replaced"),
    "parameter removed": (assign("bias", None), r"parameter 'bias' .*is replaced, added or removed"),
    "parameter deleted": (lambda e: delattr(e.module.head, "weight"), r"parameter 'weight' .*is replaced"),
    "parameter added": (assign("extra", nn.Parameter(torch.zeros(4))), r"parameter 'extra' .*is replaced, added"),
    "module added": (assign("extra", nn.Linear(4, 4)), r"Linear, put into the wrapped Linear as 'extra'.*wrap it then"),
    "module appended": (append_block, r"Linear, put into the wrapped ModuleList as '2'"),
    "module replaced": (lambda e: setattr(e.module, "head", nn.Linear(4, 4)), r"put into the wrapped Net as 'head'"),
    "parameter shared": (steal, r"put into the wrapped Net as 'head'"),
    "weight_norm": (lambda e: nn.utils.weight_norm(e.module.head), r"is replaced, added or removed"),
    "DataParallel": (
        lambda e: e.module._replicate_for_data_parallel(),
        r"_replicate_for_data_parallel\(\) on the wrapped Net is refused; .*call it without DataParallel",
    ),
    "deepcopy": (copy.deepcopy, r"deep-copying .* is refused"),
    "half": (lambda e: e.module.half(), r"moving or casting Net is refused"),
    "to": (lambda e: e.module.head.to(torch.float64), r"moving or casting Linear is refused"),
    "to_empty": (lambda e: e.module.to_empty(device="meta"), r"moving or casting Net is refused"),
    "load_state_dict": (lambda e: e.module.load_state_dict({}), r"engine.load_state_dict"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_and_nothing_is_changed(engine: OffloadEngine, name: str) -> None:
    act, message = REFUSED[name]
    before = engine.state_dict()
    with pytest.raises(RuntimeError, match=message) as caught:
        act(engine)
    assert "\n" not in str(caught.value)
    after = engine.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    engine.optimizer.zero_grad()
    plain = Net()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    for call, done in ((plain, optimizer), (engine, engine)):
        call(X).square().sum().backward()
        done.step()
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(engine.state_dict()[key], value)


@pytest.fixture
def process_group() -> Iterator[None]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store = torch.distributed.TCPStore("127.0.0.1", port, 1, is_master=True)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.skipif(os.name != "posix", reason="gloo over loopback")
def test_distributed_data_parallel_is_refused(engine: OffloadEngine) -> None:
    with pytest.raises(RuntimeError, match=r"DistributedDataParallel around a wrapped module is refused"):
        nn.parallel.DistributedDataParallel(engine.module)
    engine.backward(engine(X).sum())
    engine.step()


def test_modules_without_parameters_of_their_own_may_come_and_go(engine: OffloadEngine) -> None:
    model, plain = engine.module, Net()
    for one in (model, plain):
        one.drop = nn.Dropout(0.5)
        one.head = nn.Sequential(one.head, nn.Tanh())
        one.blocks = nn.ModuleList([one.blocks[1], one.blocks[0]])
        one.head[0].weight = one.head[0].weight  # the same object, as tying anew does
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    for _ in range(2):
        for call, done in ((plain, optimizer), (engine, engine)):
            loss = call(X).square().sum()
            loss.backward()
            done.step()
        optimizer.zero_grad()
    with torch.no_grad():
        torch.testing.assert_close(engine(X), plain(X))


def test_construction_that_fails_gives_plain_modules_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(engine: OffloadEngine) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(OffloadEngine, "_begin_commits", fail)
    model = Net()
    with pytest.raises(ZeroDivisionError):
        OffloadEngine(model, AdamW(), OffloadConfig(device="cpu", dtype=torch.float32))
    for part in model.modules():
        assert type(part._parameters) is dict and type(part._modules) is dict
        assert not {"forward", "zero_grad", "_ddp_params_and_buffers_to_ignore"} & vars(part).keys()
    model.extra = nn.Linear(4, 4)
    assert torch.equal(model.half()(X.half()), Net().half()(X.half()))
