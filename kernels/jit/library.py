"""The kernels compiled by numba, with the functions and signatures of the native library."""

from __future__ import annotations

import ctypes
import importlib
from functools import cache
from types import ModuleType, SimpleNamespace
from typing import Any

from ..native.library import PREFIX, SIGNATURES, LibraryUnavailable


@cache
def load() -> SimpleNamespace:
    """Every kernel of `.kernels` as a ctypes function `offl_*`; calls through it release the GIL.

    Compiles all of them, about ten seconds of one core and 140 MiB. Numba keeps the result in `__pycache__` beside the
    source or, where that is read-only, in the user's cache directory (NUMBA_CACHE_DIR names another); from there it
    takes half a second. Where neither is writable every process compiles.

    Raises: LibraryUnavailable, in one sentence for the user.
    """
    try:
        numba = importlib.import_module("numba")
    except ImportError as error:
        if error.name == "numba":
            raise LibraryUnavailable(
                "Numba, which comes near the compiled C, is not installed: pip install numba."
            ) from error
        raise LibraryUnavailable(f"numba cannot be imported: {error}") from error
    try:
        kernels = importlib.import_module(".kernels", __package__)
        functions = {PREFIX + name: _compile(numba, kernels, name) for name in SIGNATURES if hasattr(kernels, name)}
    except Exception as error:  # numba has many, and none of them may stop a training that torch can do
        reason = f"{type(error).__name__} {error}".strip().splitlines()[0]
        raise LibraryUnavailable(f"numba {numba.__version__} cannot compile the kernels: {reason}") from error
    return SimpleNamespace(**functions)


def _compile(numba: ModuleType, kernels: ModuleType, name: str) -> Any:
    result, arguments = SIGNATURES[name]
    signature = _numba_type(numba, result)(*(_numba_type(numba, argument) for argument in arguments))
    function = getattr(kernels, name)
    try:
        compiled = numba.cfunc(signature, cache=True, error_model="numpy")(function)
    except RuntimeError as error:
        if "cannot cache" not in str(error):
            raise
        compiled = numba.cfunc(signature, error_model="numpy")(function)
    pointer: Any = ctypes.CFUNCTYPE(result, *arguments)(compiled.address)
    pointer.compiled = compiled  # the code lives as long as this object
    return pointer


def _numba_type(numba: ModuleType, ctype: Any) -> Any:
    numbers = {
        None: numba.types.void,
        ctypes.c_int: numba.types.int32,
        ctypes.c_int64: numba.types.int64,
        ctypes.c_float: numba.types.float32,
        ctypes.c_double: numba.types.float64,
    }
    return numbers.get(ctype, numba.types.int64)  # an address travels in the same register
