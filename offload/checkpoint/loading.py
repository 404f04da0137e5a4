"""Reads a checkpoint back: compares it with the run that wants it, then gives it out unit by unit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..access import HostParameter, ParameterAccess
from ..layout import UnitLayout
from ..store.codec import decode
from ..units import ParameterInfo
from ..weights.files import TensorFile, TensorSpec
from . import document
from .document import SavedParameter
from .errors import CheckpointDamaged, CheckpointMismatch
from .folder import check_lengths, locate
from .saving import BUFFERS_NAME, hash_frozen
from .verification import first_damage

_MOST_DIFFERENCES = 20


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """What `resume` went on from.

    Args:
        path: the checkpoint.
        step: the last finished step.
        data: what `save` was given.
    """

    path: Path
    step: int
    data: Any


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What a checkpoint has to agree with.

    Args:
        optimizer: `OptimizerSpec.describe()`.
        groups: the parameters of each parameter group.
        buffers: what the module holds now, by name.
    """

    parameters: Sequence[ParameterInfo]
    layouts: Sequence[UnitLayout]
    optimizer: Mapping[str, Any]
    groups: Sequence[Sequence[nn.Parameter]]
    buffers: Mapping[str, Tensor]

    def group_names(self) -> list[list[str]]:
        names = {info.parameter: info.name for info in self.parameters}
        return [[names[parameter] for parameter in group] for group in self.groups]


class Loading:
    """A checkpoint whose every byte has been compared with its checksum.

    Raises: CheckpointMissing; CheckpointDamaged, naming the file; OSError.
    """

    def __init__(self, path: Path) -> None:
        self.path = locate(path)
        self.document = document.read(self.path)
        check_lengths(self.path, self.document)
        damage = first_damage(self.path, self.document)
        if damage is not None:
            raise CheckpointDamaged(f"{damage}; take another checkpoint, this run has not been changed")
        self._specs: dict[str, TensorSpec] = {}
        self._values: dict[str, str] = {}
        self._states: dict[str, dict[str, str]] = {}
        for name in self.document.files:
            with TensorFile(self.path / name) as file:
                self._take_in(name, file)
        self.buffers = self._read_buffers()

    def _take_in(self, name: str, file: TensorFile) -> None:
        for tensor, spec in file.tensors.items():
            if name.startswith("states-"):
                parameter, _, kind = tensor.rpartition("/")
                self._states.setdefault(parameter, {})[kind] = name
            elif name != BUFFERS_NAME:
                self._values[tensor] = name
            self._specs[f"{name}:{tensor}"] = spec

    def _read_buffers(self) -> dict[str, Tensor]:
        if BUFFERS_NAME not in self.document.files:
            return {}
        with TensorFile(self.path / BUFFERS_NAME) as file:
            return {name: file.view(name).clone() for name in file.tensors}

    @property
    def result(self) -> Resumed:
        return Resumed(path=self.path, step=self.document.step, data=decode(self.document.data))

    def run_state(self) -> dict[str, Any]:
        """What `RunState.restore` takes."""
        return {**self.document.run_state(), "buffers": self.buffers}

    # -- comparing

    def refuse_other(self, facts: RunFacts, access: ParameterAccess) -> None:
        """Raises: CheckpointMismatch naming every difference, unless this checkpoint is of this model and optimizer."""
        lines = [
            *self._other_parameters(facts),
            *self._other_optimizer(facts),
            *self._other_buffers(facts),
        ]
        if not lines:
            lines = [*self._other_states(facts, access), *self._other_frozen(facts, access)]
        if lines:
            more = [f"... and {len(lines) - _MOST_DIFFERENCES} more"] if len(lines) > _MOST_DIFFERENCES else []
            raise CheckpointMismatch(
                f"{self.path} was saved by another run; nothing has been changed. Build the model and the optimizer "
                "that it was saved with, or start anew without it:\n  "
                + "\n  ".join([*lines[:_MOST_DIFFERENCES], *more])
            )

    def _other_parameters(self, facts: RunFacts) -> Iterator[str]:
        saved, now = self.document.parameters, {info.name: info for info in facts.parameters}
        for name in saved.keys() - now.keys():
            yield f"parameter {name}: only in the checkpoint, {_described(saved[name])}"
        for name in now.keys() - saved.keys():
            yield f"parameter {name}: only in this run, {_described(_as_saved(now[name]))}"
        for name, info in now.items():
            if name not in saved:
                continue
            before, here = saved[name], _as_saved(info)
            if (before.shape, before.trainable) != (here.shape, here.trainable):
                yield f"parameter {name}: {_described(before)} in the checkpoint, {_described(here)} in this run"
            elif not info.trainable and before.dtype != here.dtype and not _both_float(before.dtype, here.dtype):
                yield f"frozen parameter {name}: {before.dtype} in the checkpoint, {here.dtype} in this run"
            elif sorted(before.names) != sorted(here.names):
                yield f"parameter {name}: shared as {before.names} in the checkpoint, as {here.names} in this run"

    def _other_optimizer(self, facts: RunFacts) -> Iterator[str]:
        before, here = self.document.optimizer, facts.optimizer
        for key in ("name", "states"):
            if before[key] != here[key]:
                yield f"optimizer's {key}: {before[key]} in the checkpoint, {here[key]} in this run"
        groups, now = self.document.groups, facts.group_names()
        if len(groups) != len(now):
            yield f"parameter groups: {len(groups)} in the checkpoint, {len(now)} in this run"
        else:
            for number, (names, ours) in enumerate(zip(groups, now, strict=True)):
                if names != ours:
                    differ = sorted(set(names) ^ set(ours)) or ["their order"]
                    yield f"parameter group {number}: {', '.join(differ[:5])} ({len(differ)} in all)"

    def _other_buffers(self, facts: RunFacts) -> Iterator[str]:
        for name in self.buffers.keys() | facts.buffers.keys():
            before, here = self.buffers.get(name), facts.buffers.get(name)
            if before is None or here is None or before.shape != here.shape or before.dtype != here.dtype:
                yield f"buffer {name}: {_shown(before)} in the checkpoint, {_shown(here)} in this run"

    def _other_states(self, facts: RunFacts, access: ParameterAccess) -> Iterator[str]:
        for layout in facts.layouts:
            for parameter, member in layout.by_parameter.items():
                if member.segment == "frozen":
                    continue
                name = member.info.name
                here = {kind: TensorSpec.of(state) for kind, state in access.blank(layout, parameter).states.items()}
                before = {kind: self._specs[f"{file}:{name}/{kind}"] for kind, file in self._of(name).items()}
                if here != before:
                    yield f"states of {name}: {_kinds(before)} in the checkpoint, {_kinds(here)} in this run"

    def _of(self, name: str) -> dict[str, str]:
        return self._states.get(name, {})

    def _other_frozen(self, facts: RunFacts, access: ParameterAccess) -> Iterator[str]:
        """Frozen parameters that the checkpoint leaves out have to be here already."""
        left_out = self.document.left_out
        for layout in facts.layouts:
            chosen = [p for p, member in layout.by_parameter.items() if member.info.name in left_out]
            for name, found in hash_frozen(access, layout, chosen, settle=True).items():
                if found != left_out[name]:
                    yield (
                        f"frozen parameter {name}: the checkpoint leaves its values out (frozen=False), and those "
                        f"of this run differ (checksum {found}, {left_out[name]} then)"
                    )

    # -- giving out

    @contextlib.contextmanager
    def unit(self, layout: UnitLayout) -> Iterator[dict[nn.Parameter, HostParameter]]:
        """A unit's values as `ParameterAccess.write` takes them, mapped from the files: bytes come in as they are
        touched, and go when this ends. Parameters that were left out are absent."""
        with contextlib.ExitStack() as stack:
            files: dict[str, TensorFile] = {}

            def view(name: str, tensor: str) -> Tensor:
                if name not in files:
                    files[name] = stack.enter_context(TensorFile(self.path / name))
                return files[name].view(tensor)

            values = {}
            for parameter, member in layout.by_parameter.items():
                name = member.info.name
                if name not in self._values:
                    continue
                value = view(self._values[name], name)
                states = {kind: view(file, f"{name}/{kind}") for kind, file in self._of(name).items()}
                dtype = member.info.dtype if member.segment == "frozen" else torch.float32
                values[parameter] = HostParameter(name=name, value=value.to(dtype), states=states)
            yield values


def saved_parameters(parameters: Sequence[ParameterInfo]) -> dict[str, SavedParameter]:
    return {info.name: _as_saved(info) for info in parameters}


def _as_saved(info: ParameterInfo) -> SavedParameter:
    dtype = str(info.dtype).removeprefix("torch.")
    return SavedParameter(names=list(info.names), shape=list(info.shape), dtype=dtype, trainable=info.trainable)


def _described(saved: SavedParameter) -> str:
    return f"{tuple(saved.shape)} {'trainable' if saved.trainable else 'frozen'}"


def _both_float(*dtypes: str) -> bool:
    return all(dtype in ("float16", "bfloat16", "float32", "float64") for dtype in dtypes)


def _shown(buffer: Tensor | None) -> str:
    return "none" if buffer is None else f"{tuple(buffer.shape)} {buffer.dtype}"


def _kinds(specs: Mapping[str, TensorSpec]) -> str:
    return ", ".join(f"{kind} {spec.shape} {spec.dtype}" for kind, spec in sorted(specs.items())) or "none"
