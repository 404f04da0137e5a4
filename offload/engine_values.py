"""The doors of an engine through which values go in and out: gathering, state dicts, files, averages, states."""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from .access import HostParameter, ParameterAccess
from .assembly import Assembly
from .average import ShownAverage
from .bindings import Bindings
from .checkpoint import Checkpoints
from .durable import CommitLog, RunState
from .residency import Residency
from .runtime import CallRuntime
from .scheduler.loop import LoopThread
from .takeover import Takeover
from .torch_states import TorchState
from .values import Values
from .weights.export import save_pretrained


class EngineValues(ABC):
    """What `OffloadEngine` can do with values between computing with them. Whoever looks first gets an engine that is
    open and of one step: nothing is half updated, and no update that was guessed is seen."""

    module: nn.Module
    _parts: Assembly
    _access: ParameterAccess
    _average: ShownAverage
    _bindings: Bindings
    _checkpoints: Checkpoints
    _log: CommitLog | None
    _loop: LoopThread
    _residency: Residency
    _runtime: CallRuntime
    _state: RunState
    _takeover: Takeover
    _values: Values

    @abstractmethod
    def _check_open(self) -> None:
        """Raises: what `OffloadEngine` raises if it is closed or of no more use."""

    @abstractmethod
    def _take_back_early(self) -> None:
        """Make all values those of the last decided step."""

    def gather(
        self, *patterns: str, write: bool = False
    ) -> contextlib.AbstractContextManager[dict[str, HostParameter]]:
        """Bring real values of parameters to host memory, as fp32 masters, with states and gradients.

        Args:
            patterns: `fnmatch` patterns on parameter names, e.g. "blocks.0.*".
            write: whether values, states and gradients edited inside are written back at the end.

        Raises: KeyError if a pattern matches nothing, and for states of other names; ValueError for other shapes. They
            and an exception inside leave everything as it was. What breaks off the writing itself, such as OSError
            from the store, leaves an engine that is of no more use.
        """
        self._check_open()
        self._bindings.look_for_edits()
        self._take_back_early()
        if write:
            self._average.check_hidden("gather(write=True)")
        return self._values.gather(patterns, write)

    def state_dict(self) -> dict[str, Tensor]:
        """The module's state dict in full precision (fp32 masters) in host memory, read unit by unit."""
        return self._state_dict()

    def _state_dict(self, averaged: bool = False) -> dict[str, Tensor]:
        self._check_open()
        self._bindings.look_for_edits()
        self._take_back_early()
        self._takeover.values_changed()
        try:
            return self._values.state_dict(averaged)
        finally:
            self._takeover.values_changed()

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True) -> None:
        """Set parameters and buffers from `state_dict`, unit by unit; optimizer states stay.

        Raises: KeyError for missing and unexpected names (if `strict`), ValueError for shapes that differ; nothing is
            written then. Anything else that comes in between, such as OSError from the store, after which the engine
            is of no more use.
        """
        self._check_open()
        self._average.check_hidden("load_state_dict()")
        self._take_back_early()
        self._values.load_state_dict(state_dict, strict)

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Inside, the model computes with the moving average of its weights (`OffloadConfig(ema_decay=...)`).

        For evaluation: forwards, `state_dict`, `gather` without write. Training, saving and writing are refused;
        `save_pretrained` writes the average. At
        the end the weights are back in every bit, also after an exception. Each unit is read and written once on the
        way in and once on the way out; buffers are those of the model.

        Raises: RuntimeError where no average is kept, and inside another such block.
        """
        self._check_open()
        with self._average.show():
            before = self._runtime.refuse_backward
            self._runtime.refuse_backward = (
                "a backward inside averaged_weights(), whose gradients would be those of the average; leave the block "
                "first"
            )
            try:
                yield
            finally:
                self._runtime.refuse_backward = before

    def ema_state_dict(self) -> dict[str, Tensor]:
        """`state_dict()` with the moving average in the place of trainable parameters; before the first update the
        parameters themselves. Raises: RuntimeError where no average is kept."""
        self._average.check_kept()
        self._average.check_hidden("ema_state_dict()")
        return self._state_dict(averaged=True)

    def read_states(self) -> dict[nn.Parameter, HostParameter]:
        """States of all trainable parameters in host memory."""
        self._check_open()
        self._take_back_early()
        return self._values.states()

    def write_states(self, states: Mapping[nn.Parameter, TorchState]) -> None:
        """Replace optimizer states and step counts, unit by unit (`optimizer.load_state_dict`). A moving average stays
        as it is; one that has not begun is still the weights. Raises: as `load_state_dict`."""
        self._check_open()
        self._average.check_hidden("optimizer.load_state_dict()")
        self._take_back_early()
        self._values.write_states(states)

    def names(self) -> dict[nn.Parameter, str]:
        """The names of trainable parameters."""
        return {info.parameter: info.name for info in self._parts.parameters if info.trainable}

    def save_pretrained(
        self, path: str | os.PathLike[str], dtype: torch.dtype | None = None, max_shard_size: str | int = "5GB"
    ) -> None:
        """Write the weights as they are now as a folder in Hugging Face's layout, part by part, in a few MiB of memory.

        The folder appears whole or not at all; other files that are in it (a tokenizer's) stay. Inside
        `averaged_weights()` it is the average that is written.

        Args:
            path: the folder; weights and configuration in it are replaced.
            dtype: of all floating-point parameters; None: fp32 masters, and frozen parameters as they rest.
            max_shard_size: bytes of one file ("5GB"); a larger parameter has a file of its own.

        Raises: ValueError for arguments that cannot work; OSError, after which the folder is what it was.
        """
        self._check_open()
        self._bindings.look_for_edits()
        self._take_back_early()
        save_pretrained(Path(path), self.module, self._parts.layouts, self._access.parts, dtype, max_shard_size)

    # -- around what others read and write

    def _before_write(self, unit: int) -> None:
        self._bindings.drop_private()
        self._take_back_early()
        self._residency.settle()
        if self._log is not None:
            self._log.launch(self._state.capture_tracked)
            self._log.wait()
        self._checkpoints.before_write(unit)
        self._loop.run(self._residency.withdraw([self._parts.layouts[unit].unit]))

    def _after_write(self, unit: int, edited: bool = True) -> None:
        self._loop.call_soon(self._residency.admit, [self._parts.layouts[unit].unit])
        self._takeover.values_changed()
        if edited:
            self._runtime.updates_launched([unit])
        self._checkpoints.values_written(unit)
        if self._log is not None:
            self._log.changed({unit: None})

    def _read_private(self, parameter: nn.Parameter) -> Tensor:
        self._take_back_early()
        return self._access.read_compute(parameter)

    def _show(self, parameter: nn.Parameter) -> nn.Parameter:
        return self._runtime.leaf(self._bindings.show(parameter, outside_of_forward=not self._runtime.computing))

    def _value_for_state_dict(self, parameter: nn.Parameter) -> Tensor:
        self._check_open()
        self._take_back_early()
        return self._values.for_state_dict(parameter)
