"""A frozen base with adapters: it streams read-only, the adapters train, and the numbers are those of plain torch."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offload import AdamW, OffloadConfig, OffloadEngine

WIDTH = 64


class Adapted(nn.Module):
    """A frozen layer, in one of the formats in which bases are stored, and a low-rank adapter beside it."""

    def __init__(self, format: str) -> None:
        super().__init__()
        weight = torch.randn(WIDTH, WIDTH) / WIDTH**0.5
        scale = weight.abs().amax(1, keepdim=True) / 127
        codes = (weight / scale).round()
        self.format = format
        if format == "float":
            self.base = nn.Parameter(weight, requires_grad=False)
        elif format == "int8 parameter":
            self.base = nn.Parameter(codes.to(torch.int8), requires_grad=False)
        elif format == "float8 parameter":
            self.base = nn.Parameter((weight / scale).to(torch.float8_e4m3fn), requires_grad=False)
        else:
            self.register_buffer("base", (codes + 128).to(torch.uint8))
        self.register_buffer("scale", scale)
        self.down = nn.Linear(WIDTH, 4, bias=False)
        self.up = nn.Linear(4, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        base = self.base.to(x.dtype)
        if self.format == "uint8 buffer":
            base = base - 128
        if self.format != "float":
            base = base * self.scale.to(x.dtype)
        return F.linear(x, base) + self.up(self.down(x))


class Base(nn.Module):
    """Four blocks between a frozen embedding and a frozen head."""

    def __init__(self, format: str = "float") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(31, WIDTH).requires_grad_(False)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(WIDTH), Adapted(format), nn.Tanh()) for _ in range(4))
        for block in self.blocks:
            block[0].requires_grad_(False)
        self.head = nn.Linear(WIDTH, 31).requires_grad_(False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + block(x)
        return F.cross_entropy(self.head(x).float().flatten(0, 1), targets.flatten())


FORMATS = ("float", "int8 parameter", "float8 parameter", "uint8 buffer")
TOKENS = torch.arange(24).reshape(2, 12) % 31
DATA = (TOKENS[:, :-1], TOKENS[:, 1:])


def plain_losses(format: str, num_steps: int) -> tuple[list[float], nn.Module]:
    model = Base(format)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(num_steps):
        loss = model(*DATA)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, model


@pytest.mark.parametrize("format", FORMATS)
def test_adapters_train_as_in_torch(kit: SimpleNamespace, settings: dict[str, Any], format: str) -> None:
    expected, trained = plain_losses(format, 4)
    with OffloadEngine(Base(format), AdamW(lr=1e-2), OffloadConfig(dtype=torch.float32, **settings)) as engine:
        losses = []
        for _ in range(4):
            loss = engine(*DATA)
            engine.backward(loss)
            engine.step()
            losses.append(float(loss.detach()))
        assert losses == pytest.approx(expected, rel=1e-6)
        found = engine.state_dict()
        for name, value in trained.state_dict().items():
            assert found[name].dtype == value.dtype
            if value.dtype == torch.float32:
                torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)
            else:
                assert kit.bits(found[name]) == kit.bits(value), name
        for name, host in kit.state_of(engine).items():
            assert bool(host.states) == (".up." in name or ".down." in name), name


def nvme(folder: Path, **more: Any) -> dict[str, Any]:
    return {"device": "cpu", "dtype": torch.float32, "nvme": folder, "update": "step", "activation_memory": 0, **more}


@pytest.mark.parametrize(("where", "durability"), [("nvme", "none"), ("nvme", "step"), ("host", "step")])
def test_a_frozen_base_is_read_and_never_written(
    kit: SimpleNamespace, tmp_path: Path, where: str, durability: Any
) -> None:
    homes = {"param": where, "states": "host", "grad": "host"}
    settings = nvme(tmp_path, homes=homes, durability=durability, overwrite=True)

    def wrap(budget: int) -> OffloadEngine:
        return OffloadEngine(Base(), AdamW(lr=1e-2), OffloadConfig(host_memory=budget, **settings))

    smallest = kit.smallest_budget(lambda budget: wrap(budget).close())
    config = OffloadConfig(host_memory=smallest, **settings)
    with OffloadEngine(Base(), AdamW(lr=1e-2), config) as engine:
        layouts, homes_of = engine._parts.layouts, engine._parts.homes
        store = engine._parts.store
        assert store is not None
        written: list[str] = []
        write = store.write

        async def noted(key: str, piece: int, buffer: Tensor, **more: Any) -> None:
            written.append(key)
            await write(key, piece, buffer, **more)

        store.write = noted
        for _ in range(3):
            engine.backward(engine(*DATA))
            info = engine.step()
        engine.flush()
        frozen = sum(layout.nbytes("frozen") for layout in layouts)
        adapted = {f"{layout.unit.name}/param" for layout in layouts if layout.nbytes("param")}
        assert frozen > 4 * WIDTH * WIDTH * 4
        assert not [key for key in written if key.endswith("/frozen")]
        if durability == "step" or where == "nvme":
            assert {key for key in written if key.endswith("/param")} == adapted
        if where == "nvme":  # in forward and in backward, but for what is still there
            assert info.nbytes["read"] > frozen
            adapters = sum(layout.nbytes("param") for layout in layouts)
            assert info.nbytes["write"] <= adapters + sum(layout.nbytes("states") for layout in layouts)
        assert {home["states"].tier for home in homes_of} == {"host"}


def test_dram_goes_to_adapters_before_their_base(tmp_path: Path) -> None:
    """A budget that holds a part of the base holds all gradients and states of the adapters."""
    model = Base()
    config = OffloadConfig(**nvme(tmp_path, host_memory=256 << 10))
    with OffloadEngine(model, AdamW(lr=1e-2), config) as engine:
        homes = engine._parts.homes
        assert {home["param"].tier for home in homes} >= {"nvme", "host"}
        for layout, home in zip(engine._parts.layouts, homes, strict=True):
            for kind in ("states", "grad"):
                if layout.nbytes(kind):
                    assert home[kind].tier == "host", (layout.unit.name, kind)


def test_resumed_adapters_on_their_base(kit: SimpleNamespace, tmp_path: Path) -> None:
    """The base in the store is whole although later steps do not write it, where it rests in memory too."""

    def run(folder: Path, stops: bool) -> dict[str, Any]:
        config = nvme(folder, host_memory="64MiB")
        engine = OffloadEngine(Base(), AdamW(lr=1e-2), OffloadConfig(**config))
        for step in range(4):
            if stops and step == 2:
                engine.close()
                other = Base()
                with torch.no_grad():
                    for parameter in other.parameters():
                        parameter.zero_()
                engine = OffloadEngine(other, AdamW(lr=1e-2), OffloadConfig(resume=True, **config))
            engine.backward(engine(*DATA))
            engine.step()
        with engine:
            return dict(kit.state_of(engine))

    kit.assert_same_state(run(tmp_path / "a", False), run(tmp_path / "b", True))


def test_a_frozen_value_written_by_hand_is_committed(kit: SimpleNamespace, tmp_path: Path) -> None:
    config = nvme(tmp_path, host_memory="64MiB")
    with OffloadEngine(Base(), AdamW(lr=1e-2), OffloadConfig(**config)) as engine:
        with engine.gather("blocks.0.1.base", write=True) as parameters:
            parameters["blocks.0.1.base"].value.fill_(0.125)
        engine.backward(engine(*DATA))
        engine.step()
    with OffloadEngine(Base(), AdamW(lr=1e-2), OffloadConfig(resume=True, **config)) as engine:
        assert bool((engine.state_dict()["blocks.0.1.base"] == 0.125).all())
