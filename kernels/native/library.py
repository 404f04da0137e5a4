"""Find, build once if need be, and load the shared library of the native kernels.

Looked for in this order: beside this file (installed by the build), then the user's cache directory, where it is
compiled at first use when there is a compiler. A library built from another version of the C source is not used.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from . import build as _build

ISAS = ("portable", "avx2", "avx512")


class AdamStruct(ctypes.Structure):
    """`struct adam` of the C source; the fields of `factors.AdamFactors`."""

    _fields_ = [
        (name, ctypes.c_float)
        for name in (
            "grad_scale",
            "one_minus_beta1",
            "beta2",
            "one_minus_beta2",
            "eps",
            "step_size",
            "decay",
            "l2",
        )
    ]


class SgdStruct(ctypes.Structure):
    """`struct sgd` of the C source; the fields of `factors.SgdFactors`."""

    _fields_ = [
        ("grad_scale", ctypes.c_float),
        ("lr", ctypes.c_float),
        ("momentum", ctypes.c_float),
        ("one_minus_dampening", ctypes.c_float),
        ("l2", ctypes.c_float),
        ("nesterov", ctypes.c_int32),
        ("first", ctypes.c_int32),
    ]


class RoundingStruct(ctypes.Structure):
    """`struct rounding` of the C source."""

    _fields_ = [("key0", ctypes.c_uint32), ("key1", ctypes.c_uint32), ("first_index", ctypes.c_uint64)]


class StreamStruct(ctypes.Structure):
    """`struct stream` of the C source: mode 0 reads, 1 reads and writes in place, 2 writes."""

    _fields_ = [("data", ctypes.c_void_p), ("size_nbytes", ctypes.c_int32), ("mode", ctypes.c_int32)]


_INT, _SIZE, _FLOAT, _DOUBLE = ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_double
_ADDRESS = ctypes.c_void_p
_ADAM, _SGD, _ROUNDING = (ctypes.POINTER(struct) for struct in (AdamStruct, SgdStruct, RoundingStruct))
SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "limit_isa": (_INT, (_INT,)),
    "source_hash": (ctypes.c_char_p, ()),
    "adam": (None, (_INT, _SIZE, *(_ADDRESS,) * 5, _ADAM)),
    "adam_bf16": (None, (_INT, _SIZE, *(_ADDRESS,) * 5, _ADAM, _ROUNDING)),
    "adam_8bit": (None, (_INT, _SIZE, *(_ADDRESS,) * 7, _ADAM)),
    "sgd": (None, (_INT, _SIZE, *(_ADDRESS,) * 4, _SGD)),
    "squared_norm": (_DOUBLE, (_INT, _SIZE, _ADDRESS)),
    "copy": (None, (_INT, _INT, _SIZE, _ADDRESS, _ADDRESS)),
    "accumulate": (None, (_INT, _INT, _SIZE, _ADDRESS, _ADDRESS)),
    "copy_squared_norm": (_DOUBLE, (_INT, _INT, _SIZE, _ADDRESS, _ADDRESS)),
    "accumulate_squared_norm": (_DOUBLE, (_INT, _INT, _SIZE, _ADDRESS, _ADDRESS)),
    "scale": (None, (_INT, _SIZE, _ADDRESS, _FLOAT)),
    "projection_sums": (None, (_INT, _SIZE, _ADDRESS, _ADDRESS, _ADDRESS, _ADDRESS)),
    "project": (None, (_INT, _SIZE, _ADDRESS, _ADDRESS, _ADDRESS, _FLOAT, _FLOAT)),
    "split": (None, (_SIZE, _ADDRESS, _ADDRESS, _ADDRESS)),
    "join": (None, (_SIZE, _ADDRESS, _ADDRESS, _ADDRESS)),
    "stream": (ctypes.c_uint64, (_SIZE, _INT, ctypes.POINTER(StreamStruct))),
}
PREFIX = "offl_"


class LibraryUnavailable(RuntimeError):
    """The shared library could not be found, built or loaded; the message is one sentence for the user."""


@cache
def load() -> ctypes.CDLL:
    """The loaded library with its signatures declared. Calls through it release the GIL.

    Raises: LibraryUnavailable, saying what was tried and how to mend it.
    """
    beside = Path(__file__).with_name(_build.LIBRARY_NAME)
    if (library := _open_current(beside)) is not None:
        return library
    cached = cache_dir() / _build.LIBRARY_NAME
    if (library := _open_current(cached)) is not None:
        return library
    try:
        built = _build.build(cached.parent)
    except _build.BuildError as error:
        raise LibraryUnavailable(str(error)) from error
    except OSError as error:
        raise LibraryUnavailable(
            f"The native kernels could not be compiled into {cached.parent}: {error}. Make it writable or set "
            "XDG_CACHE_HOME."
        ) from error
    if (library := _open_current(built)) is None:
        raise LibraryUnavailable(f"The native kernels were compiled to {built} but could not be loaded from there.")
    return library


def cache_dir() -> Path:
    """Where a library built at first use is kept: one directory per version of the C source."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "offload" / _build.source_hash()


@contextlib.contextmanager
def limit_isa(name: str) -> Iterator[str]:
    """Within the block use at most the instruction set `name`, in the whole process; yields the one in effect.

    Raises: ValueError for a name that is not in `ISAS`.
    """
    if name not in ISAS:
        raise ValueError(f"There is no instruction set {name!r}; expected one of {', '.join(ISAS)}.")
    library = load()
    try:
        yield ISAS[library.offl_limit_isa(ISAS.index(name))]
    finally:
        library.offl_limit_isa(len(ISAS) - 1)


def _open_current(path: Path) -> ctypes.CDLL | None:
    """The library at `path`, or None if there is none, it does not load, or it is of another version."""
    if not path.is_file():
        return None
    try:
        library = ctypes.CDLL(str(path))
        for name, (result, arguments) in SIGNATURES.items():
            function = getattr(library, PREFIX + name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError):
        return None
    return library if library.offl_source_hash().decode() == _build.source_hash() else None
