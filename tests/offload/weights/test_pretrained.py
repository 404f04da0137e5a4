"""Weights from safetensors files and back: the same bits, tied names, shards, and refusals that list names."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file
from torch import Tensor, nn

from offload import SGD, AdamW, OffloadConfig, OffloadEngine, deferred_init
from offload.access import ParameterAccess

HOST = OffloadConfig(device="cpu", host_memory="64MiB")


def small(kit: SimpleNamespace, **changes: Any) -> nn.Module:
    return kit.TinyGPT(**{"width": 96, "depth": 3, **changes})


def files_of(model: nn.Module, folder: Path, dtype: torch.dtype = torch.float32, shards: int = 1) -> Path:
    """The model's weights as another program would write them, the tied head left out, in `shards` files."""
    folder.mkdir(parents=True)
    state = {n: p.detach().to(dtype) for n, p in model.named_parameters()} | dict(model.named_buffers())
    names = list(state)
    parts = [names[first::shards] for first in range(shards)]
    if shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for number, part in enumerate(parts):
        file = f"part-{number}.safetensors"
        save_file({name: state[name] for name in part}, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def masters(path: Path, module: nn.Module, config: OffloadConfig = HOST, **options: Any) -> dict[str, Tensor]:
    with OffloadEngine.from_pretrained(path, AdamW(lr=1e-2), config, module=module, **options) as engine:
        return engine.state_dict()


def assert_equal_bits(kit: SimpleNamespace, one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype and kit.bits(value) == kit.bits(other[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_masters_are_the_files_values_exactly(
    kit: SimpleNamespace, tmp_path: Path, dtype: torch.dtype, compute: torch.dtype
) -> None:
    source = small(kit, seed=1)
    with deferred_init():
        module = small(kit, seed=2)
    path = files_of(source, tmp_path / "weights", dtype, shards=3)
    config = OffloadConfig(device="cpu", host_memory="64MiB", dtype=compute, nvme=tmp_path / "nvme")
    expected = {name: value.to(dtype).float() for name, value in source.state_dict().items()}
    assert_equal_bits(kit, masters(path, module, config), expected)


def test_frozen_parameters_are_cast_to_the_compute_dtype(kit: SimpleNamespace, tmp_path: Path) -> None:
    source = small(kit, seed=1)
    with deferred_init(seeded=False):
        module = small(kit, seed=2).requires_grad_(False)
    path = files_of(source, tmp_path / "weights")
    expected = {name: value.bfloat16() for name, value in source.state_dict().items()}
    assert_equal_bits(kit, masters(path, module), expected)


@pytest.mark.parametrize("form", ["folder", "index", "file", "odd name"])
def test_every_form_of_path(kit: SimpleNamespace, tmp_path: Path, form: str) -> None:
    source = small(kit, seed=1)
    path = files_of(source, tmp_path / "weights", shards=2 if form == "index" else 1)
    if form == "index":
        path = path / "model.safetensors.index.json"
    if form == "file":
        path = path / "model.safetensors"
    if form == "odd name":
        (path / "model.safetensors").rename(path / "consolidated.safetensors")
    assert_equal_bits(kit, masters(path, small(kit, seed=2)), source.state_dict())


def test_a_module_on_the_meta_device_will_do(kit: SimpleNamespace, tmp_path: Path) -> None:
    source = small(kit, seed=1)
    with torch.device("meta"):
        module = small(kit, seed=2)
    assert_equal_bits(kit, masters(files_of(source, tmp_path / "weights"), module), source.state_dict())


def test_buffers_come_along(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(80, 80), nn.BatchNorm1d(80), nn.Linear(80, 80))

    source = build()
    source(torch.randn(16, 80))
    module = build()
    masters(files_of(source, tmp_path / "weights"), module)
    assert torch.equal(module[1].running_mean, source[1].running_mean)
    assert module[1].num_batches_tracked == 1


def test_buffers_that_a_deferred_build_has_put_in_place_come_along(tmp_path: Path) -> None:
    """A buffer set behind `register_buffer` is made when the engine takes the model, and filled after that."""

    class Scaled(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.linear = nn.Linear(80, 80)
            self.register_buffer("scale", None)
            self._buffers["scale"] = torch.empty(1 << 16).fill_(scale)

    source = Scaled(7.0)
    with deferred_init(seeded=False):
        module = Scaled(2.0)
    with OffloadEngine.from_pretrained(files_of(source, tmp_path / "weights"), SGD(), HOST, module=module) as engine:
        assert torch.equal(engine.module.scale, source.scale)


def test_every_misfit_is_listed_and_nothing_changes(kit: SimpleNamespace, tmp_path: Path) -> None:
    path = files_of(small(kit, seed=1), tmp_path / "weights")
    state = load_file(path / "model.safetensors")
    del state["norm.weight"]
    state["extra.weight"] = torch.zeros(3)
    save_file(state, path / "model.safetensors")
    module = small(kit, seed=2)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"1 missing in the files: \[norm\.weight\]; 1 unexpected there: \[extra\.weight\]"
    ):
        masters(path, module)
    state["norm.bias"] = torch.zeros(7)
    save_file(state, path / "model.safetensors")
    with pytest.raises(ValueError, match=r"norm\.bias: \(7,\) in the files, \(96,\) in the model"):
        masters(path, module, strict=False)
    assert_equal_bits(kit, module.state_dict(), before)


def test_what_is_missing_is_initialised_and_said(kit: SimpleNamespace, tmp_path: Path) -> None:
    source = small(kit, seed=1)
    path = files_of(source, tmp_path / "weights")
    state = load_file(path / "model.safetensors")
    del state["blocks.0.up.weight"]
    save_file(state, path / "model.safetensors")
    with deferred_init():
        module = small(kit, seed=2)
    with pytest.warns(UserWarning, match=r"1 missing in the files: \[blocks\.0\.up\.weight\]"):
        found = masters(path, module, strict=False)
    expected = source.state_dict()
    expected["blocks.0.up.weight"] = small(kit, seed=2).state_dict()["blocks.0.up.weight"]
    assert_equal_bits(kit, found, expected)
    with torch.device("meta"):
        module = small(kit)
    with pytest.raises(ValueError, match=r"\[blocks\.0\.up\.weight\] would have no values at all"):
        masters(path, module, strict=False)


@pytest.mark.parametrize("same", [True, False])
def test_both_names_of_a_tied_weight(kit: SimpleNamespace, tmp_path: Path, same: bool) -> None:
    source = small(kit, seed=1)
    path = files_of(source, tmp_path / "weights")
    state = load_file(path / "model.safetensors")
    state["head.weight"] = state["tokens.weight"] + (0 if same else 1)
    save_file(state, path / "model.safetensors")
    if same:
        assert_equal_bits(kit, masters(path, small(kit, seed=2)), source.state_dict())
        return
    with pytest.raises(ValueError, match="one parameter of the model and two different tensors"):
        masters(path, small(kit, seed=2))


@pytest.mark.parametrize("damage", ["cut", "absent", "index", "nothing"])
def test_damaged_files_are_named(kit: SimpleNamespace, tmp_path: Path, damage: str) -> None:
    path = files_of(small(kit), tmp_path / "weights", shards=2)
    shard = path / "part-1.safetensors"
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-8])
    if damage == "absent":
        shard.unlink()
    if damage == "index":
        state = load_file(shard)
        state.pop(next(iter(state)))
        save_file(state, shard)
    if damage == "nothing":
        for file in path.iterdir():
            file.unlink()
        (path / "pytorch_model.bin").touch()
    expected = {
        "cut": r"part-1\.safetensors has \d+ bytes, its header says",
        "absent": r"names files that are not there: part-1\.safetensors",
        "index": "lists 1 tensors that are not in the file it names",
        "nothing": r"holds 0 safetensors files and no index \(pytorch_model\.bin\)",
    }
    with pytest.raises(ValueError, match=expected[damage]):
        masters(path, small(kit))


def test_eight_bit_floats_are_not_cast(kit: SimpleNamespace, tmp_path: Path) -> None:
    path = files_of(small(kit), tmp_path / "weights", torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="neither converts to the other"):
        masters(path, small(kit))


# -- saving


def trained(kit: SimpleNamespace, module: nn.Module, config: OffloadConfig = HOST) -> OffloadEngine:
    engine = OffloadEngine(module, AdamW(lr=1e-2), config)
    for x, y in kit.batches(2):
        engine.backward(engine(x, y))
        engine.step()
    return engine


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("max_shard_size", ["5GB", "200KB"])
def test_saved_weights_are_read_back_bit_for_bit(
    kit: SimpleNamespace, tmp_path: Path, dtype: torch.dtype | None, max_shard_size: str
) -> None:
    """By safetensors itself: updates that are still pending are in it, and a frozen block keeps its dtype."""
    with trained(kit, small(kit, frozen=True)) as engine:
        engine.save_pretrained(tmp_path / "out", dtype, max_shard_size)
        state = engine.state_dict()
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    found: dict[str, Tensor] = {}
    for file in files:
        found.update(load_file(file))
    index = tmp_path / "out" / "model.safetensors.index.json"
    assert index.exists() == (max_shard_size == "200KB") == (len(files) > 1)
    if index.exists():
        weight_map = json.loads(index.read_text())["weight_map"]
        assert weight_map.keys() == found.keys()
        assert all(name in load_file(tmp_path / "out" / file) for name, file in weight_map.items())
        assert all(file.stat().st_size < 210_000 for file in files if len(load_file(file)) > 1)
    del state["head.weight"]  # tied
    assert_equal_bits(kit, found, {n: v if dtype is None else v.to(dtype) for n, v in state.items()})


def test_safetensors_own_loader_restores_tied_names(kit: SimpleNamespace, tmp_path: Path) -> None:
    with trained(kit, small(kit)) as engine:
        engine.save_pretrained(tmp_path / "out")
        state = engine.state_dict()
    model = small(kit, seed=5)
    load_model(model, tmp_path / "out" / "model.safetensors")
    assert_equal_bits(kit, model.state_dict(), state)


def test_a_saved_folder_goes_round(kit: SimpleNamespace, tmp_path: Path) -> None:
    config = OffloadConfig(device="cpu", host_memory="64MiB", nvme=tmp_path / "nvme", homes=kit.ALL_NVME)
    with trained(kit, small(kit, frozen=True), config) as engine:
        engine.save_pretrained(tmp_path / "out", max_shard_size="300KB")
        state = engine.state_dict()
    with deferred_init(seeded=False):
        module = small(kit, frozen=True)
    assert_equal_bits(kit, masters(tmp_path / "out", module), state)


def test_saving_replaces_weights_and_keeps_other_files(kit: SimpleNamespace, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with trained(kit, small(kit)) as engine:
        engine.save_pretrained(out, max_shard_size="100KB")
        (out / "tokenizer.json").write_text("{}")
        (out / "vocabulary").mkdir()
        (out / "vocabulary" / "a.txt").write_text("a")
        engine.save_pretrained(out)
    assert sorted(p.name for p in out.iterdir()) == ["model.safetensors", "tokenizer.json", "vocabulary"]
    assert (out / "vocabulary" / "a.txt").read_text() == "a"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_a_save_that_fails_leaves_the_folder_as_it_was(
    kit: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with trained(kit, small(kit)) as engine:
        engine.save_pretrained(out)
        before = (out / "model.safetensors").read_bytes()
        whole = ParameterAccess.parts

        def broken(self: ParameterAccess, layout: Any) -> Iterator[Any]:
            yield from whole(self, layout)
            if layout.unit.index == 2:
                raise OSError("the drive is gone")

        monkeypatch.setattr(ParameterAccess, "parts", broken)
        with pytest.raises(OSError, match="the drive is gone"):
            engine.save_pretrained(out)
    assert (out / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_arguments_that_cannot_work(kit: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with OffloadEngine(small(kit), AdamW(lr=1e-2), HOST) as engine:
        with pytest.raises(ValueError, match=r"dtype=torch\.int8"):
            engine.save_pretrained(tmp_path / "out", torch.int8)
        with pytest.raises(ValueError, match="max_shard_size='much' is not a size"):
            engine.save_pretrained(tmp_path / "out", max_shard_size="much")
        with pytest.raises(ValueError, match="file is a file"):
            engine.save_pretrained(tmp_path / "file")
    with pytest.raises(ValueError, match="does not exist"):
        masters(tmp_path / "nowhere", small(kit))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]
