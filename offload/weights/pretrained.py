"""First values from safetensors files, read where they are mapped, one unit at a time."""

from __future__ import annotations

import contextlib
import importlib
import json
import re
import warnings
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..units import ParameterInfo, Unit
from .adoption import DeferredValues
from .export import saved_buffers
from .files import TensorFile
from .folder import WeightFolder
from .recorder import deferred_init
from .source import Reader

_LISTED = 8


def open_pretrained(path: Path, module: nn.Module | None, strict: bool) -> tuple[nn.Module, PretrainedValues]:
    """See `OffloadEngine.from_pretrained`."""
    files = WeightFolder(path)
    if module is None:
        module = build_from_config(files.folder)
    return module, PretrainedValues(module, files, strict)


class PretrainedValues:
    """Values of a module's parameters from files; what the files lack, from the module itself.

    Raises: ValueError listing missing, unexpected and mis-shaped names, with nothing changed.
    """

    def __init__(self, module: nn.Module, files: WeightFolder, strict: bool) -> None:
        self._files = files
        self._own = DeferredValues(module)
        names: dict[nn.Parameter, list[str]] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            names.setdefault(parameter, []).append(name)
        self._names = {p: [n for n in its if n in files.tensors] for p, its in names.items()}
        self._module = module
        lacking = [its[0] for p, its in names.items() if not self._names[p]]
        lacking += [n for n in saved_buffers(module) if n not in files.tensors]
        known = {name for its in names.values() for name in its} | set(saved_buffers(module))
        fit = _Fit(
            missing=_without(lacking, module, "_keys_to_ignore_on_load_missing"),
            unexpected=_without(set(files.tensors) - known, module, "_keys_to_ignore_on_load_unexpected"),
            different=list(self._differences()),
        )
        unmakeable = sorted(set(self._own.without_values) & set(lacking))
        fit.check(files, strict, unmakeable)

    @property
    def repeatable(self) -> Collection[nn.Parameter]:
        return self._own.repeatable

    def begin(self) -> None:
        self._own.begin()
        with contextlib.ExitStack() as stack, torch.no_grad():
            opened: dict[Path, TensorFile] = {}
            for name, buffer in saved_buffers(self._module).items():  # as they are now: deferred ones have been made
                if name in self._files.tensors:
                    buffer.copy_(self._view(name, opened, stack))

    @contextlib.contextmanager
    def unit(self, unit: Unit) -> Iterator[Reader]:
        with contextlib.ExitStack() as stack:
            opened: dict[Path, TensorFile] = {}
            own = stack.enter_context(self._own.unit(unit))

            def read(info: ParameterInfo) -> Tensor:
                names = self._names[info.parameter]
                if not names:
                    return own(info)
                value = self._view(names[0], opened, stack)
                for other in names[1:]:
                    if not torch.equal(value, self._view(other, opened, stack)):
                        raise ValueError(
                            f"{names[0]!r} and {other!r} are one parameter of the model and two different tensors in "
                            f"{self._files.folder}; untie them in the model, or remove one of them from the files"
                        )
                return value

            yield read

    def give_back(self) -> None:
        self._own.give_back()

    def _view(self, name: str, opened: dict[Path, TensorFile], stack: contextlib.ExitStack) -> Tensor:
        path = self._files.file_of[name]
        if path not in opened:
            opened[path] = stack.enter_context(TensorFile(path))
        return opened[path].view(name)

    def _differences(self) -> Iterator[str]:
        wanted = [(name, p) for p, names in self._names.items() for name in names] + [
            (name, buffer) for name, buffer in saved_buffers(self._module).items() if name in self._files.tensors
        ]
        for name, tensor in wanted:
            spec = self._files.tensors[name]
            if spec.shape != tuple(tensor.shape):
                yield f"{name}: {spec.shape} in the files, {tuple(tensor.shape)} in the model"
            elif not _converts(spec.dtype, tensor.dtype):
                yield (
                    f"{name}: {spec.dtype} in the files, {tensor.dtype} in the model, and neither converts to the other"
                )


class _Fit:
    """How a set of files fits a module."""

    def __init__(self, *, missing: list[str], unexpected: list[str], different: list[str]) -> None:
        self._missing = missing
        self._unexpected = unexpected
        self._different = different

    def check(self, files: WeightFolder, strict: bool, unmakeable: list[str]) -> None:
        """Raises: ValueError for what cannot be filled, or must not be, with a list."""
        lists = [("missing in the files", self._missing), ("unexpected there", self._unexpected)]
        text = "; ".join(f"{len(names)} {what}: {_list(names)}" for what, names in lists if names)
        if self._different:
            raise ValueError(
                f"{files.folder} does not fit the model: {len(self._different)} of another kind: "
                + _list(self._different)
                + (f"; {text}" if text else "")
                + "; build the model of the configuration that the files were made with"
            )
        if (strict and text) or unmakeable:
            mend = (
                f"; {_list(unmakeable)} would have no values at all: build the model inside "
                "`with offload.deferred_init():`"
                if unmakeable
                else "; build the model that the files were made from, or give strict=False to load what fits"
            )
            renamed = (
                ". Names are taken as they are: what transformers renames or stacks while it loads does not fit; load "
                "such a checkpoint with transformers, and save its state dict under the model's own names"
                if self._missing and self._unexpected
                else ""
            )
            raise ValueError(f"{files.folder} does not fit the model: {text}{mend}{renamed}")
        if text:
            warnings.warn(
                f"{files.folder} does not fit the model: {text}. What is missing was initialised by the model itself, "
                "what is unexpected was left out",
                stacklevel=5,
            )


def _list(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - _LISTED} more" if len(ordered) > _LISTED else ""
    return "[" + ", ".join(ordered[:_LISTED]) + "]" + more


def _converts(source: torch.dtype, target: torch.dtype) -> bool:
    """8-bit floats need scales that no cast knows, so they fit themselves alone."""
    wide = all(dtype.is_floating_point and dtype.itemsize > 1 for dtype in (source, target))
    return source == target or wide


def _without(names: Iterable[str], module: nn.Module, attribute: str) -> list[str]:
    """Names that no pattern of a Hugging Face class tells a loader to overlook."""
    patterns = getattr(module, attribute, None) or ()
    return [name for name in names if not any(re.search(pattern, name) for pattern in patterns)]


def build_from_config(folder: Path) -> nn.Module:
    """The Hugging Face model that `config.json` in `folder` describes, built without memory and without values.

    Raises: ValueError without a configuration, or for a class that transformers does not have; ImportError without
        transformers.
    """
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} has no config.json to build a model from; give module=...")
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise ImportError(
            f"building the model of {folder / 'config.json'} needs transformers: install it, or give module=..."
        ) from error
    names = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or ["(none)"]
    model_class = getattr(transformers, names[0], None)
    if model_class is None:
        raise ValueError(
            f"config.json in {folder} asks for the class {names[0]}, which transformers {transformers.__version__} "
            "does not have; build the model inside `with offload.deferred_init(seeded=False):` and give module=..."
        )
    with deferred_init(seeded=False):
        model: nn.Module = model_class(transformers.AutoConfig.from_pretrained(folder))
    if (folder / "generation_config.json").exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model
