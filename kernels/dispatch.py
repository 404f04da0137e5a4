"""Which implementation runs: for CPU tensors native C, else the same compiled by numba where it is installed, else
plain torch; for the others Triton or plain torch.

The choice is one per process, not one per thread: the kernels are called from executor threads that must follow what
the main thread asked for. `OFFLOAD_KERNELS=native|numba|reference` in the environment forces it; it is read at first
use.
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
from typing import Any

import torch

from . import reference
from .jit import library as jit_library
from .native import library
from .native.calls import Calls

_LOG = logging.getLogger("offload.kernels")
_COMPILED = ("native", "numba")  # the faster one first
_NAMES = (*_COMPILED, "reference", "triton", "auto")
_forced: str | None = None  # set by `use`; None: the environment, else automatic


def implementation() -> str:
    """What runs for CPU tensors: "native", "numba" or "reference"; "triton" only where a test asked for it.

    At first use this compiles what has to be compiled, which takes seconds.

    Raises: ValueError if OFFLOAD_KERNELS holds another word; RuntimeError if what is forced cannot run.
    """
    wanted = _wanted()
    if wanted in ("reference", "triton"):
        return wanted
    for name in _COMPILED if wanted == "auto" else (wanted,):
        if _load_failure(name) is None:
            if name != wanted:
                _notice_once(name)
            return name
    if wanted != "auto":
        raise RuntimeError(f"The {wanted} kernels were asked for but cannot run. {_load_failure(wanted)}")
    _notice_once("reference")
    return "reference"


def why_not_native() -> str | None:
    """Why CPU tensors do not take the native kernels, and where they take plain torch, why not numba's; else None."""
    if (wanted := _wanted()) in ("reference", "numba"):
        return f"The native kernels are switched off: OFFLOAD_KERNELS or use() says {wanted}."
    reasons = []
    for name in _COMPILED:
        if (reason := _load_failure(name)) is None:
            break
        reasons.append(reason)
    return " ".join(reasons) or None


def available() -> tuple[str, ...]:
    """The implementations that can run for CPU tensors here, the fastest first; loads them."""
    return (*(name for name in _COMPILED if _load_failure(name) is None), "reference")


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """Force an implementation within the block, in every thread of the process: "native", "numba", "reference", "auto".

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


def backend(device: torch.device) -> ModuleType | Calls:
    """The module, or the object, whose functions compute on flat tensors of `device`."""
    if uses_triton(device):
        return importlib.import_module(".triton", __package__)
    if device.type == "cpu" and (name := implementation()) in _COMPILED:
        return _calls(name)
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
def _load_failure(name: str) -> str | None:
    """Why the kernels "native" or "numba" cannot run here, None where they can; loads them."""
    try:
        _load(name)
    except library.LibraryUnavailable as error:
        return str(error)
    return None


def _load(name: str) -> Any:
    return library.load() if name == "native" else jit_library.load()


@cache
def _calls(name: str) -> Calls:
    return Calls(_load(name))


@cache
def _notice_once(name: str) -> None:
    if name == "numba":
        _LOG.warning("CPU kernels are compiled by numba: ten seconds at first use, then cached. %s", why_not_native())
    elif name == "reference":
        _LOG.warning("CPU kernels run in plain torch, 5 to 20 times slower. %s", why_not_native())
