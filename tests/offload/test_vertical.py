"""All micro-batches of a step in one pass: the plain loop's bits, and each unit brought to the device once."""

from __future__ import annotations

import contextvars
import gc
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from greenlet import getcurrent
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from offload import SGD, AdamW, OffloadConfig, OffloadEngine
from offload.access import HostParameter
from offload.ambient import Surroundings
from offload.units import CallSite
from offload.vertical import Forwards

NOTICE = "train_step runs micro-batches one after another"


def loss_of(result: Any, batch: Any) -> Tensor:
    """Mean square of whatever the module returns."""
    return result.float().square().mean()


def train(
    module: nn.Module,
    config: OffloadConfig,
    steps: Sequence[Sequence[Any]],
    vertical: bool,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    look: Callable[[OffloadEngine], None] | None = None,
) -> tuple[list[tuple[float | None, float]], dict[str, HostParameter]]:
    """One step per item of `steps`, by `train_step` or by the loop that it stands for.

    Returns (loss, norm) of each step, and the state at the end.
    """
    seen = []
    with OffloadEngine(module, AdamW(lr=1e-2), config) as engine:
        torch.manual_seed(3)
        for batches in steps:
            if vertical:
                info = engine.train_step(batches, loss_fn)
            else:
                for batch in batches:
                    result = engine(**batch) if isinstance(batch, dict) else engine(*batch)
                    engine.backward((result if loss_fn is None else loss_fn(result, batch)) / len(batches))
                info = engine.step(partial=len(batches) < config.micro_batches)
            seen.append((info.loss, info.grad_norm))
        with engine.gather("*") as parameters:
            state = dict(parameters)
        if look is not None:
            look(engine)
    return seen, state


def assert_same(
    kit: SimpleNamespace,
    make: Callable[[], nn.Module],
    steps: Sequence[Sequence[Any]],
    config: Mapping[str, Any],
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    look: Callable[[OffloadEngine], None] | None = None,
) -> list[tuple[float | None, float]]:
    """`train_step` gives the loop's losses, norms, masters and states, in every bit. Returns losses and norms."""
    settings = {"micro_batches": max(map(len, steps)), "dtype": torch.float32, **config}
    in_memory = {k: v for k, v in settings.items() if k in ("micro_batches", "dtype", "clip_grad_norm")}
    plain, expected = train(make(), OffloadConfig(**in_memory, device="cpu"), steps, False, loss_fn)
    ours, state = train(make(), OffloadConfig(**settings), steps, True, loss_fn, look)
    assert ours == plain
    kit.assert_same_state(state, expected)
    return ours


def in_steps(data: Sequence[Any], num: int) -> list[Sequence[Any]]:
    return [data[first : first + num] for first in range(0, len(data), num)]


def vectors(num: int, width: int = 8, seed: int = 1) -> list[tuple[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(3, width, generator=generator),) for _ in range(num)]


# -- bits


@pytest.mark.parametrize("micro_batches", [2, 4])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_plain_loops_bits(
    kit: SimpleNamespace, settings: dict[str, Any], dtype: torch.dtype, tied: bool, micro_batches: int
) -> None:
    steps = in_steps(kit.batches(3 * micro_batches), micro_batches)
    seen = assert_same(kit, lambda: kit.TinyGPT(tied=tied), steps, {**settings, "dtype": dtype, "clip_grad_norm": 0.3})
    assert min(norm for _, norm in seen) > 0.3, "clipping must bite"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_plain_loops_bits_in_the_smallest_window(kit: SimpleNamespace, tmp_path: Path, dtype: torch.dtype) -> None:
    """Room for one unit, and what the others rest in is poisoned by nobody but overwritten by the next."""
    config = {"nvme": tmp_path, "homes": kit.ALL_NVME, "overwrite": True, "micro_batches": 3, "dtype": dtype}

    def make(budget: int) -> None:
        OffloadEngine(kit.TinyGPT(), AdamW(), OffloadConfig(**config, host_memory=budget)).close()

    smallest = kit.smallest_budget(make)
    assert_same(kit, kit.TinyGPT, in_steps(kit.batches(6), 3), {**config, "host_memory": smallest})


@pytest.mark.parametrize("activation_memory", [0, "64MiB"])
@pytest.mark.parametrize("update", ["next_forward", "backward", "speculative", "step"])
def test_every_time_of_updating(kit: SimpleNamespace, tmp_path: Path, update: str, activation_memory: Any) -> None:
    """A unit whose update begins in backward has been visited by all micro-batches before."""
    config = {"nvme": tmp_path, "homes": kit.ALL_NVME, "host_memory": "64MiB", "update": update}
    steps = in_steps(kit.batches(12), 3)
    assert_same(kit, lambda: kit.TinyGPT(tied=False), steps, {**config, "activation_memory": activation_memory})


def one_slot(kit: SimpleNamespace, make: Callable[[], nn.Module]) -> dict[str, Any]:
    """Settings of the fake device with room for one unit: it is reused between rounds, poisoned in between."""

    def build(budget: int) -> None:
        OffloadEngine(make(), AdamW(), OffloadConfig(device="fake", device_memory=budget, dtype=torch.float32)).close()

    return {"device": "fake", "device_memory": kit.smallest_budget(build)}


def test_bits_on_a_device_with_room_for_one_unit(kit: SimpleNamespace) -> None:
    assert_same(kit, kit.TinyGPT, in_steps(kit.batches(6), 3), one_slot(kit, kit.TinyGPT))


def test_frozen_units_and_a_shorter_last_step(kit: SimpleNamespace, settings: dict[str, Any]) -> None:
    data = kit.batches(7)
    assert_same(kit, lambda: kit.TinyGPT(frozen=True), [data[:3], data[3:6], data[6:]], settings)


def test_sum_reduction_and_a_loss_in_the_result(kit: SimpleNamespace) -> None:
    class Output(SimpleNamespace):
        pass

    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = kit.TinyGPT()

        def forward(self, x: Tensor, y: Tensor, as_dict: bool) -> Any:
            loss = self.body(x, y)
            return {"loss": loss} if as_dict else Output(loss=loss)

    data = kit.batches(2)
    batches = [{"x": x, "y": y, "as_dict": bool(i)} for i, (x, y) in enumerate(data)]
    config = OffloadConfig(dtype=torch.float32, micro_batches=2)
    with OffloadEngine(WithLoss(), SGD(lr=0.1), config) as engine:
        ours = engine.train_step(batches, reduction="sum")
    with OffloadEngine(kit.TinyGPT(), SGD(lr=0.1), config) as engine:
        losses = [engine(x, y) for x, y in data]
        for loss in losses:
            engine.backward(loss)
        plain = engine.step()
    assert (ours.loss, ours.grad_norm, ours.tokens) == (plain.loss, plain.grad_norm, None)


class TiedByHand(nn.Module):
    """Computes with a child's weight outside of any unit, twice, and inside of one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embed = nn.Embedding(11, 8)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.block(self.embed(tokens)) * self.scale
        return F.linear(hidden, self.embed.weight) + F.linear(hidden * self.scale, self.embed.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_weights_read_outside_of_units(kit: SimpleNamespace, settings: dict[str, Any], dtype: torch.dtype) -> None:
    """Autograd would add up three micro-batches' gradients of one leaf in 16 bits, before anybody sees them."""
    tokens = [(torch.randint(11, (2, 5), generator=torch.Generator().manual_seed(i)),) for i in range(6)]
    assert_same(kit, TiedByHand, in_steps(tokens, 3), {**settings, "dtype": dtype}, loss_of)


class CalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.one = nn.Linear(8, 8)
        self.two = nn.Sequential(nn.Linear(8, 8), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(self.two(torch.tanh(self.one(x)))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_unit_called_twice(kit: SimpleNamespace, settings: dict[str, Any], dtype: torch.dtype) -> None:
    data = [(x.to(dtype),) for (x,) in vectors(8)]
    assert_same(kit, CalledTwice, in_steps(data, 4), {**settings, "dtype": dtype}, loss_of)


class SharedInside(nn.Module):
    """A module that is called by itself, inside of another unit, and whose weight is read."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.shared = nn.Linear(8, 8)
        self.block = nn.Sequential(nn.Linear(8, 8), self.shared, nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.shared(self.block(x)), self.shared.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_unit_inside_of_another(kit: SimpleNamespace, settings: dict[str, Any], dtype: torch.dtype) -> None:
    data = [(x.to(dtype),) for (x,) in vectors(8)]
    assert_same(kit, SharedInside, in_steps(data, 4), {**settings, "dtype": dtype}, loss_of)


# -- traffic and order


def read_per_step(kit: SimpleNamespace, folder: Path, micro_batches: int, vertical: bool) -> int:
    """Parameter bytes read from NVMe in a step, when there is room for little more than one unit and nothing else."""
    homes = {"param": "nvme", "states": "host", "grad": "host"}
    config = {"nvme": folder, "homes": homes, "overwrite": True, "dtype": torch.float32, "micro_batches": micro_batches}

    def make(budget: int) -> None:
        OffloadEngine(kit.TinyGPT(depth=4), AdamW(), OffloadConfig(**config, host_memory=budget)).close()

    config["host_memory"] = kit.smallest_budget(make)
    reads = []
    with OffloadEngine(kit.TinyGPT(depth=4), AdamW(), OffloadConfig(**config)) as engine:
        for batches in in_steps(kit.batches(4 * micro_batches), micro_batches):
            if vertical:
                reads.append(engine.train_step(batches).nbytes["read"])
            else:
                for x, y in batches:
                    engine.backward(engine(x, y))
                reads.append(engine.step().nbytes["read"])
    return sum(reads[1:]) // 3


def test_parameter_bytes_do_not_grow_with_micro_batches(kit: SimpleNamespace, tmp_path: Path) -> None:
    one, two, four = (read_per_step(kit, tmp_path, n, True) for n in (1, 2, 4))
    assert one == two == four
    assert read_per_step(kit, tmp_path, 4, False) > 2.5 * four


def visits_of(engine: OffloadEngine, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(site, micro-batch) of every call that backward visits from here on."""
    visits = []
    begins = engine._runtime.backward_begins

    def note(site: CallSite, turn: Any) -> None:
        visits.append((site.name, turn.micro_batch))
        begins(site, turn)

    monkeypatch.setattr(engine._runtime, "backward_begins", note)
    return visits


def test_backward_visits_each_unit_for_all_micro_batches_in_their_order(
    kit: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = OffloadConfig(dtype=torch.float32, micro_batches=3)
    with OffloadEngine(kit.TinyGPT(), AdamW(), config) as engine:
        visits = visits_of(engine, monkeypatch)
        engine.train_step(kit.batches(3))
    sites = ["head", "norm", "blocks.1", "blocks.0"]
    assert visits[:12] == [(site, number) for site in sites for number in range(3)]
    assert sorted(visits[12:]) == [(site, number) for site in ("positions", "tokens") for number in range(3)]


def test_a_units_gradient_goes_home_once(kit: SimpleNamespace, tmp_path: Path) -> None:
    """Four micro-batches' sum is written once, its norm taken on the way: no byte more than for one micro-batch."""

    def moved(micro_batches: int) -> tuple[int, int]:
        homes = {"param": "host", "states": "host", "grad": "nvme"}
        config = OffloadConfig(
            dtype=torch.float32,
            micro_batches=micro_batches,
            nvme=tmp_path,
            homes=homes,
            overwrite=True,
            durability="none",
            update="step",
        )
        with OffloadEngine(kit.TinyGPT(tied=False), AdamW(), config) as engine:
            for batches in in_steps(kit.batches(3 * micro_batches), micro_batches):
                info = engine.train_step(batches)
            return info.nbytes["read"], info.nbytes["write"]

    assert moved(4) == moved(1)


class Watching(nn.Module):
    """Notes whether its first unit is held after its turn in forward, and the second before its turn in backward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.held: list[int] = []
        self.holds: list[Callable[[int], int]] = []

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        self.held.append(self.holds[0](0))
        x = self.second(x)
        x.register_hook(lambda gradient: self.held.append(self.holds[0](1)))
        return x.sum()


@pytest.mark.parametrize("activation_memory", [0, "64MiB"])
def test_a_unit_is_held_until_its_last_turn(activation_memory: Any) -> None:
    """Else it may be evicted between two turns, in forward or in backward, and fetched again."""
    module = Watching()
    config = OffloadConfig(dtype=torch.float32, micro_batches=3, activation_memory=activation_memory)
    with OffloadEngine(module, AdamW(), config) as engine:
        staged = engine._residency._staged
        module.holds.append(lambda unit: staged[unit].holds)
        engine.train_step(vectors(3))
    assert module.held == [1, 1, 0, 0, 1, 1]


@pytest.mark.parametrize("roads", [[(0, 1, 2, 3), (3, 2, 1, 0), (1, 1, 0)], [(0, 1), (0, 1, 2, 3), (2,)]])
def test_different_orders_where_there_is_room_for_one_unit(
    kit: SimpleNamespace, roads: Sequence[Sequence[int]]
) -> None:
    """Nothing may be kept for a turn that comes later while a call waits for room."""

    def make() -> nn.Module:
        return Skipping(roads)

    assert_same(kit, make, in_steps(numbered(6), 3), one_slot(kit, make), loss_of)


def test_units_inside_a_mode_where_there_is_room_for_one_unit(kit: SimpleNamespace) -> None:
    def make() -> nn.Module:
        return SelfTaught(torch.inference_mode)

    assert_same(kit, make, in_steps(vectors(6), 3), one_slot(kit, make), loss_of)


# -- random numbers


def test_random_numbers_are_the_same_in_every_placement(kit: SimpleNamespace, settings: dict[str, Any]) -> None:
    steps = in_steps(kit.batches(6), 3)
    config = {"dtype": torch.float32, "micro_batches": 3}
    expected = train(kit.TinyGPT(dropout=0.2), OffloadConfig(**config, device="cpu"), steps, True)
    ours = train(kit.TinyGPT(dropout=0.2), OffloadConfig(**config, **settings), steps, True)
    assert ours[0] == expected[0]
    kit.assert_same_state(ours[1], expected[1])
    assert train(kit.TinyGPT(), OffloadConfig(**config), steps, True)[0] != expected[0], "dropout must matter"


def test_the_stated_streams(kit: SimpleNamespace) -> None:
    """Micro-batch i draws from generators seeded with s + i; the caller's show one draw and nothing else."""
    data = kit.batches(3)
    torch.manual_seed(3)
    seed = int(torch.randint(2**62, ()))
    after = torch.get_rng_state()
    plain = kit.TinyGPT(dropout=0.2)
    losses = []
    for number, (x, y) in enumerate(data):
        torch.manual_seed(seed + number)
        losses.append(float(plain(x, y).detach()))
    with OffloadEngine(
        kit.TinyGPT(dropout=0.2), AdamW(), OffloadConfig(dtype=torch.float32, micro_batches=3)
    ) as engine:
        torch.manual_seed(3)
        seen: list[float] = []

        def note(loss: Tensor, batch: Any) -> Tensor:
            seen.append(float(loss.detach()))
            return loss

        engine.train_step(data, note)
        assert torch.equal(torch.get_rng_state(), after)
    assert seen == losses[::-1], "the last micro-batch has its turn first"


def test_random_numbers_do_not_depend_on_turns(kit: SimpleNamespace) -> None:
    """Also one after another, micro-batches draw from their own streams."""
    steps = in_steps(kit.batches(6), 3)
    config = OffloadConfig(dtype=torch.float32, micro_batches=3)
    expected = train(kit.TinyGPT(dropout=0.2), config, steps, True)
    model = kit.TinyGPT(dropout=0.2)
    model.tokens.weight.register_hook(lambda gradient: None)
    ours = train(model, config, steps, True)
    assert ours[0] == expected[0]
    kit.assert_same_state(ours[1], expected[1])


def test_a_resumed_run_draws_the_same(kit: SimpleNamespace, tmp_path: Path) -> None:
    steps = in_steps(kit.batches(12), 3)
    config = {"dtype": torch.float32, "micro_batches": 3}
    seen, state = train(kit.TinyGPT(dropout=0.2), OffloadConfig(**config), steps, True)
    first, _ = train(kit.TinyGPT(dropout=0.2), OffloadConfig(**config, nvme=tmp_path), steps[:2], True)
    with OffloadEngine(
        kit.TinyGPT(dropout=0.2), AdamW(lr=1e-2), OffloadConfig(**config, nvme=tmp_path, resume=True)
    ) as engine:
        infos = [engine.train_step(batches) for batches in steps[2:]]
        kit.assert_same_state(kit.state_of(engine), state)
    assert first + [(info.loss, info.grad_norm) for info in infos] == seen


# -- what surrounds a forward


class Surrounded(nn.Module):
    """Calls its units inside of `around(number of the batch)`."""

    def __init__(self, around: Callable[[int], Any]) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first, self.second, self.third = (nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(3))
        self.last = nn.Linear(8, 8)
        self.around = around

    def forward(self, x: Tensor, number: int) -> Tensor:
        x = self.first(x)
        with self.around(number):
            x = self.third(self.second(x) @ torch.ones(8, 8))
        return self.last(x.float()) @ torch.ones(8, 8)


def numbered(num: int) -> list[tuple[Tensor, int]]:
    return [(x, number) for number, (x,) in enumerate(vectors(num))]


@pytest.mark.parametrize("which", [0, 1, 2])
def test_autocast_in_one_micro_batch(kit: SimpleNamespace, settings: dict[str, Any], which: int) -> None:
    def around(number: int) -> Any:
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=number % 3 == which)

    assert_same(kit, lambda: Surrounded(around), in_steps(numbered(6), 3), settings, loss_of)
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("which", [0, 1, 2])
def test_no_grad_in_one_micro_batch(kit: SimpleNamespace, settings: dict[str, Any], which: int) -> None:
    def around(number: int) -> Any:
        return torch.set_grad_enabled(number % 3 != which)

    assert_same(kit, lambda: Surrounded(around), in_steps(numbered(6), 3), settings, loss_of)
    assert torch.is_grad_enabled()


def test_saved_tensor_hooks_are_each_micro_batchs_own(kit: SimpleNamespace) -> None:
    """Each packs with a hook of its own; one of another's on the stack would run in that one's stack."""
    packed: list[bool] = []

    class Outside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(2)
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor, number: int) -> Tensor:
            mine = getcurrent()

            def pack(tensor: Tensor) -> Tensor:
                packed.append(getcurrent() is mine)
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                x = self.second(torch.sin(self.first(x)))
            return torch.sin(x)

    assert_same(kit, Outside, in_steps(numbered(3), 3), {}, loss_of)
    assert len(packed) >= 12 and all(packed)
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def test_default_dtype_and_context_are_each_micro_batchs_own() -> None:
    setting: contextvars.ContextVar[str] = contextvars.ContextVar("setting")
    seen: list[tuple[bool, bool, str]] = []

    class Noting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor, number: int) -> Tensor:
            before = torch.get_default_dtype()
            torch.set_default_dtype(torch.float64 if number == 1 else before)
            x = self.first(x)
            seen.append((number == 1, torch.get_default_dtype() == torch.float64, setting.get()))
            x = self.second(x)
            torch.set_default_dtype(before)
            return x.sum()

    setting.set("the caller's")
    with OffloadEngine(Noting(), SGD(), OffloadConfig(dtype=torch.float32, micro_batches=3)) as engine:
        engine.train_step(numbered(3))
    assert seen == [(mine, mine, "the caller's") for mine in (False, True, False)]
    assert torch.get_default_dtype() == torch.float32


def test_autocasts_copies_are_each_micro_batchs_own(kit: SimpleNamespace) -> None:
    """A cast copy that three graphs share collects their gradients in 16 bits."""

    def gradient(vertical: bool) -> Tensor:
        outside = torch.linspace(-1, 1, 64).reshape(8, 8).requires_grad_()

        def loss_of_linear(result: Tensor, batch: Any) -> Tensor:
            return F.linear(result, outside).float().square().mean()

        config = OffloadConfig(dtype=torch.float32, micro_batches=3)
        with OffloadEngine(CalledTwice(), SGD(), config) as engine:
            if vertical:
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    engine.train_step(vectors(3), loss_of_linear)
            else:
                for batch in vectors(3):
                    with torch.autocast("cpu", dtype=torch.bfloat16):
                        loss = loss_of_linear(engine(*batch), batch) / 3
                    engine.backward(loss)
                engine.step()
        assert outside.grad is not None
        return outside.grad

    assert kit.bits(gradient(True)) == kit.bits(gradient(False))


@pytest.mark.parametrize("whole", [False, True], ids=["inside a unit", "around units"])
def test_checkpointing(kit: SimpleNamespace, settings: dict[str, Any], whole: bool) -> None:
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x + checkpoint(lambda x: self.two(F.gelu(self.one(x))), x, use_reentrant=False)

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(2)
            self.blocks = nn.ModuleList(Inside() for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            for first in (0, 2):

                def pair(x: Tensor, first: int = first) -> Tensor:
                    return torch.sin(self.blocks[first + 1](torch.sin(self.blocks[first](x))))

                x = checkpoint(pair, x, use_reentrant=False) if whole else pair(x)
            return x

    assert_same(kit, Around, in_steps(vectors(6), 3), settings, loss_of)


class SelfTaught(nn.Module):
    """Calls its units inside of `around()` between calls outside of it."""

    def __init__(self, around: Callable[[], Any]) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.around = around

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        with self.around():
            target = self.second(self.first(x)).clone()
        return self.second(y) - target.clone() * torch.ones(8)


@pytest.mark.parametrize("mode", ["inference", "function mode"])
def test_a_mode_that_cannot_be_left(
    kit: SimpleNamespace, settings: dict[str, Any], caplog: pytest.LogCaptureFixture, mode: str
) -> None:
    """Units called inside run straight through, also where there is room for one: right, and said."""

    def around() -> Any:
        return torch.inference_mode() if mode == "inference" else torch.device("cpu")

    assert_same(kit, lambda: SelfTaught(around), in_steps(vectors(9), 3), settings, loss_of)
    assert [record.message.count("mode that cannot be left") for record in caplog.records] == [1]


def test_tensors_left_in_attributes_are_each_micro_batchs_own(kit: SimpleNamespace, settings: dict[str, Any]) -> None:
    """A router's loss is left in its module, and collected when all layers are through."""

    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(8, 8)
            self.penalty: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            x = self.body(x)
            self.penalty = x.square().mean()
            return torch.tanh(x)

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(2)
            self.layers = nn.ModuleList(Router() for _ in range(3))

            self.seen: list[float] = []

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            self.seen.append(float(self.layers[0].penalty.detach()))
            return x.mean() + sum(layer.penalty for layer in self.layers)

    def look(engine: OffloadEngine) -> None:
        assert float(engine.module.layers[0].penalty.detach()) == engine.module.seen[-3], "as the last one left it"

    assert_same(kit, Routed, in_steps(vectors(6), 3), settings, look=look)


# -- where turns are impossible


def test_batch_norm_runs_one_by_one(
    kit: SimpleNamespace, settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    def make() -> nn.Module:
        torch.manual_seed(2)
        return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8, affine=False))

    plain = make()
    with torch.no_grad():
        for batch in vectors(3):
            plain(*batch)
    buffers: list[dict[str, Tensor]] = []

    def keep(engine: OffloadEngine) -> None:
        buffers.append({name: buffer.clone() for name, buffer in engine.module.named_buffers()})

    assert_same(kit, make, in_steps(vectors(3), 3), settings, loss_of, keep)
    for name, buffer in plain.named_buffers():
        assert kit.bits(buffer) == kit.bits(buffers[0][name]), name
    assert_same(kit, make, in_steps(vectors(9), 3), settings, loss_of)
    assert [record.message.count("forward changes the buffer '1.running_mean'") for record in caplog.records] == [1, 1]


def test_a_module_that_counts_runs_one_by_one(kit: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(2)
            self.body = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
            self.count = 0

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            return self.body[1](self.body[0](x) * self.count)

    assert_same(kit, Counting, in_steps(vectors(6), 3), {}, loss_of)
    assert [record.message.count("forward changes the attribute 'count'") for record in caplog.records] == [1]


class Skipping(nn.Module):
    """Leaves out or swaps layers as the data say."""

    def __init__(self, roads: Sequence[Sequence[int]]) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(4))
        self.roads = roads

    def forward(self, x: Tensor, number: int) -> Tensor:
        for index in self.roads[number % len(self.roads)]:
            x = self.layers[index](x)
        return x


@pytest.mark.parametrize(
    "roads",
    [[(0, 1, 2, 3), (0, 2, 3), (0, 1, 3)], [(0, 1, 2, 3), (3, 2, 1, 0), (1, 1, 0)], [(0, 1), (0, 1, 2, 3), (2,)]],
    ids=["skipped", "swapped", "shorter"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_different_orders(
    kit: SimpleNamespace,
    settings: dict[str, Any],
    roads: Sequence[Sequence[int]],
    dtype: torch.dtype,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Right in the step in which it shows, and one after another from then on."""
    data = [(x.to(dtype), number) for x, number in numbered(9)]
    assert_same(kit, lambda: Skipping(roads), in_steps(data, 3), {**settings, "dtype": dtype}, loss_of)
    assert [record.message.startswith(NOTICE) for record in caplog.records] == [True]
    assert caplog.records[0].levelno == logging.WARNING


def test_regular_micro_batches_are_not_noticed(kit: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    assert_same(kit, kit.TinyGPT, in_steps(kit.batches(6), 3), {})
    assert not caplog.records


def test_gradient_hooks_of_the_user_see_what_they_see_in_the_loop(kit: SimpleNamespace) -> None:
    seen: list[list[float]] = []

    def make() -> nn.Module:
        module = TiedByHand()
        norms: list[float] = []
        seen.append(norms)
        module.embed.weight.register_hook(lambda gradient: norms.append(float(gradient.norm())))
        return module

    tokens = [(torch.randint(11, (2, 5), generator=torch.Generator().manual_seed(i)),) for i in range(6)]
    assert_same(kit, make, in_steps(tokens, 3), {}, loss_of)
    assert len(seen[0]) == 6 and seen[1] == seen[0], "once per backward, as in torch"


# -- exceptions and memory


class Failing(nn.Module):
    """Raises in forward or backward of one batch, while `broken`."""

    def __init__(self, where: str) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(4))
        self.where = where
        self.broken = [False]
        self.left: list[int] = []

    def forward(self, x: Tensor, number: int) -> Tensor:
        try:
            for index, layer in enumerate(self.layers):
                x = layer(x)
                if index == 1 and number % 3 == 1 and self.broken[0]:
                    if self.where == "forward":
                        raise LookupError("no such word")
                    x.register_hook(self.fail)
        finally:
            self.left.append(number)
        return x

    def fail(self, gradient: Tensor) -> None:
        raise LookupError("no such gradient")


def assert_nothing_is_held(engine: OffloadEngine) -> None:
    gc.collect()
    assert all(not staged.holds for staged in engine._residency._staged.values())
    ledger = engine._runtime.ledger
    assert ledger._boundary_nbytes == 0
    assert not any(ledger._pending.values())


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_exception_midway(kit: SimpleNamespace, settings: dict[str, Any], where: str) -> None:
    """Every forward is left in order, nothing stays held, and the steps after it are as if it had not been."""
    steps = in_steps(numbered(6), 3)
    config = {"dtype": torch.float32, "micro_batches": 3}
    expected = train(Failing(where), OffloadConfig(**config), steps, False, loss_of)
    module = Failing(where)
    seen = []
    with OffloadEngine(module, AdamW(lr=1e-2), OffloadConfig(**config, **settings)) as engine:
        for batches in steps:
            module.broken[0] = True
            module.left.clear()
            with pytest.raises(LookupError, match="no such"):
                engine.train_step(batches, loss_of)
            assert len(module.left) == 3
            if where == "backward":
                with pytest.raises(RuntimeError, match="incomplete"):
                    engine.train_step(batches, loss_of)
            engine.optimizer.zero_grad()
            if where == "forward":  # torch keeps nodes that were ready in a failed backward until the next one
                assert_nothing_is_held(engine)
            assert torch.is_grad_enabled()
            module.broken[0] = False
            info = engine.train_step(batches, loss_of)
            assert_nothing_is_held(engine)
            seen.append((info.loss, info.grad_norm))
        kit.assert_same_state(kit.state_of(engine), expected[1])
    assert seen == expected[0]


def test_an_exception_in_forward_leaves_nothing_accumulated(kit: SimpleNamespace) -> None:
    module = Failing("forward")
    with OffloadEngine(module, AdamW(), OffloadConfig(dtype=torch.float32, micro_batches=3)) as engine:
        module.broken[0] = True
        state = torch.get_rng_state()
        torch.randint(2**62, ())
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        with pytest.raises(LookupError):
            engine.train_step(numbered(3), loss_of)
        assert torch.equal(torch.get_rng_state(), after)
        module.broken[0] = False
        engine.train_step(numbered(3), loss_of)


def test_a_forward_that_swallows_its_end_is_ended_at_its_next_unit(kit: SimpleNamespace) -> None:
    class Stubborn(Failing):
        def forward(self, x: Tensor, number: int) -> Tensor:
            try:
                return super().forward(x, number)
            except BaseException:
                if number == 1:
                    raise
            return super().forward(x, number)

    module = Stubborn("forward")
    with OffloadEngine(module, AdamW(), OffloadConfig(dtype=torch.float32, micro_batches=3)) as engine:
        module.broken[0] = True
        with pytest.raises(LookupError):
            engine.train_step(numbered(3), loss_of)
        assert sorted(module.left) == [0, 0, 1, 2, 2]
        assert_nothing_is_held(engine)


def test_what_is_kept_for_backward_is_released(kit: SimpleNamespace, settings: dict[str, Any]) -> None:
    config = OffloadConfig(dtype=torch.float32, micro_batches=3, **settings)
    with OffloadEngine(kit.TinyGPT(), AdamW(), config) as engine:
        for batches in in_steps(kit.batches(6), 3):
            engine.train_step(batches)
            assert_nothing_is_held(engine)
        assert engine.memory.boundaries_peak_nbytes > 3 * 2 * 4 * 16 * 32 * 4, "three micro-batches at once"


# -- arguments


def test_arguments_that_cannot_work(kit: SimpleNamespace) -> None:
    data = kit.batches(3)
    with OffloadEngine(kit.TinyGPT(), AdamW(), OffloadConfig(dtype=torch.float32, micro_batches=2)) as engine:
        with pytest.raises(ValueError, match="given 3 micro-batches, and a step has 1 to 2"):
            engine.train_step(data)
        with pytest.raises(ValueError, match="given 0 micro-batches"):
            engine.train_step([])
        with pytest.raises(ValueError, match="reduction='none'; give one of"):
            engine.train_step(data[:2], reduction="none")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="batches is one Tensor; give a list"):
            engine.train_step(data[0][0])  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"the module gave a tensor \[4, 16, 61\] for a loss"):
            engine.train_step([x for x, _ in data[:2]])
        with pytest.raises(TypeError, match=r"loss_fn\(result, batch\) gave a NoneType"):
            engine.train_step(data[:2], lambda result, batch: None)  # type: ignore[arg-type,return-value]
        engine.backward(engine(*data[0]))
        with pytest.raises(RuntimeError, match="this one has begun"):
            engine.train_step(data[:2])
        engine.backward(engine(*data[1]))
        engine.step()
        assert engine.train_step(data[:2]).step == 2


@pytest.mark.parametrize("at", range(4))
def test_ctrl_c_while_forwards_are_ended_leaves_the_thread_in_its_own_modes(
    at: int, kit: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three forwards fail midway inside `no_grad`; the interrupt comes at the `at`-th of four restorations of modes."""
    steps = in_steps(numbered(3), 3)
    expected = train(Failing("forward"), OffloadConfig(dtype=torch.float32, micro_batches=3), steps, False, loss_of)
    module = Failing("forward")
    close, restore = Forwards._close, Surroundings.restore
    seen: list[int] = []

    def interrupted(surroundings: Surroundings, device: Any) -> None:
        seen.append(len(seen))
        torch.set_grad_enabled(False)
        if seen[-1] == at:
            raise KeyboardInterrupt
        restore(surroundings, device)

    def closing(forwards: Forwards) -> None:
        monkeypatch.setattr(Surroundings, "restore", interrupted)
        try:
            close(forwards)
        finally:
            monkeypatch.setattr(Surroundings, "restore", restore)

    monkeypatch.setattr(Forwards, "_close", closing)
    with OffloadEngine(module, AdamW(lr=1e-2), OffloadConfig(dtype=torch.float32, micro_batches=3)) as engine:
        module.broken[0] = True
        with pytest.raises((KeyboardInterrupt, LookupError)) as raised:
            engine.train_step(steps[0], loss_of)
        assert (raised.type is KeyboardInterrupt) == (at < len(seen))
        assert torch.is_grad_enabled()
        assert engine._runtime.pause is None
        monkeypatch.setattr(Forwards, "_close", close)
        module.broken[0] = False
        engine.optimizer.zero_grad()
        engine.train_step(steps[0], loss_of)
        kit.assert_same_state(kit.state_of(engine), expected[1])
