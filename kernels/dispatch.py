"""Which implementation runs: native C or plain torch for CPU tensors, Triton or plain torch for the others.

The choice is one per process, not one per thread: the kernels are called from executor threads that must follow what
the main thread asked for. `OFFLOAD_KERNELS=reference|native` in the environment forces it; it is read at first use.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
from collections.abc import Iterator
from functools import cache
from types import ModuleType

import torch

from . import reference
from .native import calls, library

_LOG = logging.getLogger("offload.kernels")
_NAMES = ("native", "reference", "triton", "auto")
_forced: str | None = None  # set by `use`; None: the environment, else automatic


def implementation() -> str:
    """What runs for CPU tensors: "native" or "reference"; "triton" only where a test asked for its interpreter.

    Raises: ValueError if OFFLOAD_KERNELS holds another word; RuntimeError if native is forced but cannot be loaded.
    """
    wanted = _wanted()
    if wanted in ("reference", "triton"):
        return wanted
    reason = _load_failure()
    if reason is None:
        return "native"
    if wanted == "native":
        raise RuntimeError(f"The native kernels were asked for but cannot run. {reason}")
    _notice_once(reason)
    return "reference"


def why_not_native() -> str | None:
    """Why CPU tensors take the slower torch path, in one sentence; None when they do not."""
    if _wanted() == "reference":
        return "The native kernels are switched off: OFFLOAD_KERNELS or use() says reference."
    return _load_failure()


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """Force an implementation within the block, in every thread of the process: "native", "reference" or "auto".

    "triton" runs the device kernels on CPU tensors too, which works under TRITON_INTERPRET=1 only: for tests.

    Raises: ValueError for another name.
    """
    global _forced
    if name not in _NAMES:
        raise ValueError(f"There is no implementation {name!r}; expected one of {', '.join(_NAMES)}.")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def backend(device: torch.device) -> ModuleType:
    """The module whose functions compute on flat tensors of `device`."""
    if uses_triton(device):
        return importlib.import_module(".triton", __package__)
    if device.type == "cpu" and implementation() == "native":
        return calls
    return reference


def uses_triton(device: torch.device) -> bool:
    """Whether tensors of `device` go to the Triton kernels."""
    if device.type == "cpu":
        return _wanted() == "triton"
    return device.type == "cuda" and _wanted() != "reference" and _has_triton()


@cache
def tune_once(device: torch.device) -> None:
    """Let the Triton kernels find out how they are launched best on `device`; once in a process, and only on CUDA.

    Takes a few seconds and 1.7 GB of the device, which it gives back. Where it fails the kernels run as they are.
    """
    if device.type != "cuda" or not uses_triton(device):
        return
    try:
        with torch.cuda.device(device):
            importlib.import_module(".triton.tuning", __package__).tune(device)
    except Exception as error:
        _LOG.warning(
            "Kernels on %s keep their default launch shape, because measuring others failed (%s: %s).",
            device, type(error).__name__, error,
        )  # fmt: skip
    torch.cuda.empty_cache()  # what the caching allocator holds on to counts as taken in the device's budget


def _wanted() -> str:
    return _forced or _from_environment()


@cache  # read once: a look into the environment would cost as much as the rest of a call
def _from_environment() -> str:
    wanted = os.environ.get("OFFLOAD_KERNELS") or "auto"
    if wanted not in _NAMES:
        raise ValueError(f"OFFLOAD_KERNELS is {wanted!r}; expected one of {', '.join(_NAMES)}.")
    return wanted


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _load_failure() -> str | None:
    try:
        library.load()
    except library.LibraryUnavailable as error:
        return str(error)
    return None


@cache
def _notice_once(reason: str) -> None:
    _LOG.warning("CPU kernels run in plain torch, 10 to 40 times slower. %s", reason)
