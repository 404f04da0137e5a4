"""The engine's part of a trainer's checkpoint folder, and the weights that lie in it."""

from __future__ import annotations

import contextlib
import glob
import random
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..engine import OffloadEngine
from ..weights.export import saved_buffers
from ..weights.files import TensorFile

STATE_FOLDER = "engine"
PLAIN_STATE = "optimizer.pt"
"""Where the plain Trainer keeps the state dict of its torch optimizer."""


def save_state(engine: OffloadEngine, folder: Path, frozen: bool) -> None:
    """Write masters, moments and counts, from which training goes on bit for bit.

    Args:
        frozen: whether frozen parameters are written too; else `load_state` compares them with the model's.
    """
    engine.save(folder / STATE_FOLDER, frozen=frozen)


def load_state(engine: OffloadEngine, folder: Path) -> None:
    """Go on from what `save_state` wrote, or from a checkpoint of the plain Trainer: its weights and its optimizer.

    Generators stay as they are: the trainer sets them itself, when it has found its place in the data.

    Raises: FileNotFoundError for a folder without either, with the mend; what `OffloadEngine.resume` raises.
    """
    with _generators_kept():
        if (folder / STATE_FOLDER).is_dir():
            engine.resume(folder / STATE_FOLDER)
        elif (folder / PLAIN_STATE).exists():
            load_weights(engine, folder)
            packed = torch.load(folder / PLAIN_STATE, map_location="cpu", weights_only=True)
            packed["param_groups"] = [group for group in packed["param_groups"] if group["params"]]
            engine.optimizer.load_state_dict(packed)
        else:
            raise FileNotFoundError(
                f"{folder} has neither {STATE_FOLDER}/ nor {PLAIN_STATE}, so there is nothing to go on from: maybe it "
                "was saved with save_only_model=True; load its weights into the model instead, and begin a new run"
            )


def load_weights(engine: OffloadEngine, folder: Path) -> None:
    """Set the parameters and buffers that the folder's safetensors files hold; an adapter's files hold a few.

    Raises: FileNotFoundError for a folder without such files; ValueError listing names that do not fit.
    """
    with SavedWeights(folder, engine.module) as saved:
        _load(engine, folder, saved)


def _load(engine: OffloadEngine, folder: Path, saved: SavedWeights) -> None:
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in engine.module.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    missing = [mine[0] for p, mine in names.items() if p.requires_grad and not any(name in saved for name in mine)]
    unexpected = sorted(
        set(saved) - {name for mine in names.values() for name in mine} - set(saved_buffers(engine.module))
    )
    if missing or unexpected:
        raise ValueError(
            f"{folder} does not fit the model: missing {missing[:5]} ({len(missing)} in all), unexpected "
            f"{unexpected[:5]} ({len(unexpected)} in all); give the checkpoint of this model"
        )
    engine.load_state_dict(saved, strict=False)


@contextlib.contextmanager
def _generators_kept() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  what transformers saves
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


class SavedWeights(Mapping[str, Tensor]):
    """The weights of a checkpoint folder by the names that the model's state dict has, each read when it is looked up.

    Holds its files open until `close`, or the end of `with`; tensors stay good after it.

    Args:
        folder: with `*.safetensors` files: a whole model, or a PEFT adapter.
        model: tells by which names an adapter saves its weights.

    Raises: FileNotFoundError for a folder without such files; ValueError for a file that is torn.
    """

    def __init__(self, folder: Path, model: nn.Module) -> None:
        adapters = sorted(folder.glob("adapter_model*.safetensors"))
        files = adapters or sorted(folder.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"{folder} has no *.safetensors file; give the folder of a checkpoint")
        full_names = _adapter_names(model) if adapters else {}
        self._places: dict[str, tuple[TensorFile, str]] = {}
        with contextlib.ExitStack() as opened:
            for path in files:
                file = opened.enter_context(TensorFile(path))
                self._places.update({full_names.get(name, name): (file, name) for name in file.tensors})
            self._files = opened.pop_all()

    def close(self) -> None:
        """Give the files back. Twice is safe."""
        self._files.close()

    def __enter__(self) -> SavedWeights:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getitem__(self, name: str) -> Tensor:
        file, saved_name = self._places[name]
        return file.view(saved_name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _adapter_names(model: nn.Module) -> dict[str, str]:
    """For each name that PEFT saves, the name in the model's state dict: found by sending marked tensors through."""
    from peft import get_peft_model_state_dict

    marked = {name: torch.empty(p.shape, device="meta") for name, p in model.named_parameters(remove_duplicate=False)}
    names = {id(mark): name for name, mark in marked.items()}
    saved = get_peft_model_state_dict(model, state_dict=marked, save_embedding_layers=False)
    return {name: names[id(mark)] for name, mark in saved.items() if id(mark) in names}


class LoadedDtypes(Mapping[str, Tensor]):
    """The model's state dict with each parameter in the dtype that it had before the engine took it.

    A value is read when it is looked up, so whoever saves a few of them needs memory for those; ties stay ties.

    Args:
        dtypes: those dtypes, by parameter.
    """

    def __init__(self, engine: OffloadEngine, dtypes: Mapping[nn.Parameter, torch.dtype]) -> None:
        self._engine = engine
        self._dtypes = dtypes
        self._parameters = dict(engine.module.named_parameters(remove_duplicate=False))
        self._buffers = saved_buffers(engine.module)
        self._alive: weakref.WeakValueDictionary[nn.Parameter, Tensor] = weakref.WeakValueDictionary()

    def __getitem__(self, name: str) -> Tensor:
        parameter = self._parameters.get(name)
        if parameter is None:
            return self._buffers[name]
        value = self._alive.get(parameter)
        if value is None:
            with self._engine.gather(glob.escape(name)) as gathered:
                value = self._alive[parameter] = gathered[name].value.to(self._dtypes[parameter])
        return value

    def __iter__(self) -> Iterator[str]:
        yield from self._parameters
        yield from self._buffers

    def __len__(self) -> int:
        return len(self._parameters) + len(self._buffers)
