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

from . import build as _build

ISAS = ("portable", "avx2", "avx512")


class AdamStruct(ctypes.Structure):
    """`struct adam` of the C source."""

    _fields_ = [
        (name, ctypes.c_float)
        for name in (
            "grad_scale",
            "one_minus_beta1",
            "beta2",
            "one_minus_beta2",
            "rsqrt_bias2",
            "eps",
            "step_size",
            "decay",
            "l2",
        )
    ]


class SgdStruct(ctypes.Structure):
    """`struct sgd` of the C source."""

    _fields_ = [
        ("grad_scale", ctypes.c_float),
        ("lr", ctypes.c_float),
        ("momentum", ctypes.c_float),
        ("one_minus_dampening", ctypes.c_float),
        ("l2", ctypes.c_float),
        ("nesterov", ctypes.c_int32),
        ("first", ctypes.c_int32),
    ]


_INT, _SIZE, _POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
_SIGNATURES: dict[str, tuple[object, tuple[object, ...]]] = {
    "offl_limit_isa": (_INT, (_INT,)),
    "offl_source_hash": (ctypes.c_char_p, ()),
    "offl_adam": (None, (_INT, _SIZE, *(_POINTER,) * 5, ctypes.POINTER(AdamStruct))),
    "offl_sgd": (None, (_INT, _SIZE, *(_POINTER,) * 4, ctypes.POINTER(SgdStruct))),
    "offl_squared_norm": (ctypes.c_double, (_INT, _SIZE, _POINTER)),
    "offl_copy": (None, (_INT, _INT, _SIZE, _POINTER, _POINTER)),
    "offl_accumulate": (None, (_INT, _INT, _SIZE, _POINTER, _POINTER)),
    "offl_split": (None, (_SIZE, _POINTER, _POINTER, _POINTER)),
    "offl_join": (None, (_SIZE, _POINTER, _POINTER, _POINTER)),
}


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
    """Within the block use at most the instruction set `name` of `ISAS`, in the whole process; yields the one in effect.

    Raises: ValueError for another name.
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
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError):
        return None
    return library if library.offl_source_hash().decode() == _build.source_hash() else None
