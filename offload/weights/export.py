"""Writing an engine's weights as a folder that Hugging Face's and safetensors' loaders read."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..access import Part
from ..layout import UnitLayout
from ..sizes import parse_size
from ..units import ParameterInfo
from ..values import persistent_buffers
from .files import INDEX_NAME, TensorFileWriter, TensorSpec, sync

Parts = Callable[[UnitLayout], Iterator[Part]]
SINGLE_NAME = "model.safetensors"


def save_pretrained(
    path: Path,
    module: nn.Module,
    layouts: Sequence[UnitLayout],
    parts: Parts,
    dtype: torch.dtype | None,
    max_shard_size: str | int,
) -> None:
    """See `OffloadEngine.save_pretrained`.

    Args:
        parts: gives one unit's values in full precision, flat and in order, part by part.
    """
    if dtype is not None and not (dtype.is_floating_point and dtype.itemsize > 1):
        raise ValueError(
            f"dtype={dtype}; give torch.float32, torch.bfloat16, torch.float16, or None for full precision"
        )
    limit_nbytes = parse_size(max_shard_size, "max_shard_size")
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; name a folder for the weights")
    with _replacing(path) as folder:
        _Export(module, layouts, dtype).write(folder, parts, limit_nbytes)
        _write_config(folder, module, dtype or _usual_dtype(layouts))


class _Export:
    """The tensors of one folder: which there are, under which names, and in which file."""

    def __init__(self, module: nn.Module, layouts: Sequence[UnitLayout], dtype: torch.dtype | None) -> None:
        self._layouts = layouts
        infos = [info for layout in layouts for info in layout.unit.parameters]
        self._name = {info.parameter: _kept_name(info, module) for info in infos}
        self._buffers = saved_buffers(module)
        by_name = {self._name[i.parameter]: TensorSpec(_saved_dtype(i, dtype), tuple(i.shape)) for i in infos}
        by_name |= {name: TensorSpec.of(buffer) for name, buffer in self._buffers.items()}
        tied = {name: self._name[info.parameter] for info in infos for name in info.names}
        self._metadata = {"format": "pt", **{name: kept for name, kept in tied.items() if name != kept}}
        in_order = dict.fromkeys(tied[name] for name, _ in module.named_parameters(remove_duplicate=False))
        self._specs = {name: by_name[name] for name in (*in_order, *self._buffers)}

    def write(self, folder: Path, parts: Parts, limit_nbytes: int) -> None:
        shards = _shards(self._specs, limit_nbytes)
        file_of = {name: file for file, names in shards.items() for name in names}
        if len(shards) > 1:
            total_nbytes = sum(spec.nbytes for spec in self._specs.values())
            numel = sum(spec.numel for spec in self._specs.values())
            index = {"metadata": {"total_parameters": numel, "total_size": total_nbytes}, "weight_map": file_of}
            _write_text(folder / INDEX_NAME, json.dumps(index, indent=2) + "\n")
        with contextlib.ExitStack() as stack:
            writers = {}
            for file, names in shards.items():
                tensors = {name: self._specs[name] for name in names}
                writers[file] = stack.enter_context(TensorFileWriter(folder / file, tensors, self._metadata))
            for name, buffer in self._buffers.items():
                writers[file_of[name]].write(name, buffer.detach().cpu())
            for layout in self._layouts:
                for part in parts(layout):
                    name = self._name[part.info.parameter]
                    writers[file_of[name]].write(name, part.values.to(self._specs[name].dtype))
            for writer in writers.values():
                writer.finish()


def _saved_dtype(info: ParameterInfo, dtype: torch.dtype | None) -> torch.dtype:
    if not info.dtype.is_floating_point or info.dtype.itemsize == 1:
        return info.dtype
    return dtype or (torch.float32 if info.trainable else info.dtype)


def _usual_dtype(layouts: Sequence[UnitLayout]) -> torch.dtype:
    """The dtype in which most elements are written when none is asked for."""
    count: dict[torch.dtype, int] = {}
    for layout in layouts:
        for info in layout.unit.parameters:
            dtype = _saved_dtype(info, None)
            if dtype.is_floating_point and dtype.itemsize > 1:
                count[dtype] = count.get(dtype, 0) + info.numel
    return max(count, key=lambda dtype: count[dtype], default=torch.float32)


def _kept_name(info: ParameterInfo, module: nn.Module) -> str:
    """The name under which a tied parameter is written: as Hugging Face does, none that the class calls tied."""
    tied = getattr(module, "all_tied_weights_keys", None) or getattr(module, "_tied_weights_keys", None) or ()
    return next((name for name in info.names if name not in tied), info.name)


def saved_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Buffers that belong into a state dict, by name."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, part in module.named_modules()
        for name, buffer in persistent_buffers(part)
    }


def _shards(specs: Mapping[str, TensorSpec], limit_nbytes: int) -> dict[str, list[str]]:
    """File name -> the tensors in it, in order, each file within the limit unless one tensor alone exceeds it."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if shards[-1] and size + spec.nbytes > limit_nbytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += spec.nbytes
    if len(shards) == 1:
        return {SINGLE_NAME: shards[0]}
    return {f"model-{n:05d}-of-{len(shards):05d}.safetensors": names for n, names in enumerate(shards, 1)}


def _write_config(folder: Path, module: nn.Module, dtype: torch.dtype) -> None:
    """config.json and generation_config.json, where the module is a Hugging Face one."""
    config: Any = getattr(module, "config", None)
    if not callable(getattr(config, "save_pretrained", None)):
        return
    config = copy.deepcopy(config)
    config.dtype = str(dtype).removeprefix("torch.")
    config.architectures = [type(module).__name__]
    config.save_pretrained(folder)
    generation: Any = getattr(module, "generation_config", None)
    can_generate = getattr(module, "can_generate", None)
    if generation is not None and callable(can_generate) and can_generate():
        generation.save_pretrained(folder)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A fresh folder beside `path` that takes its place at the end. Files of the old one that are no weights stay."""
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)  # of a save that was killed
    old = _old_name(path)
    if old.exists() and not path.exists():
        old.rename(path)  # killed between the two renames
    fresh.mkdir()
    try:
        yield fresh
        if path.exists():
            _keep_others(path, fresh)
        for file in fresh.rglob("*"):
            sync(file)
        sync(fresh)
        _swap_in(fresh, path)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def _keep_others(old: Path, fresh: Path) -> None:
    for other in old.iterdir():
        is_weight = other.suffix == ".safetensors" or other.name == INDEX_NAME
        if not is_weight and not (fresh / other.name).exists():
            if other.is_dir():
                shutil.copytree(other, fresh / other.name, copy_function=os.link)
            else:
                os.link(other, fresh / other.name)


def _swap_in(fresh: Path, path: Path) -> None:
    """Between the two renames the old folder has another name, and both are whole."""
    old = _old_name(path)
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    try:
        fresh.rename(path)
    except BaseException:
        if old.exists():
            old.rename(path)
        raise
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _old_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
