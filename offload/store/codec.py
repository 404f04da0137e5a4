"""State as JSON and back, exactly: what tracked objects return from `state_dict` without running code on the way in."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from .errors import StoreError

_MARK = "__offload__"


def encode(value: Any, path: str = "extra") -> Any:
    """A JSON value from which `decode` rebuilds `value` exactly.

    Takes None, bool, int, float, str, bytes, list, tuple, dict with any of these as keys, tensors and NumPy arrays.
    Raises: StoreError naming the place of anything else.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, list):
        return [encode(item, f"{path}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, tuple):
        return {_MARK: "tuple", "items": [encode(item, f"{path}[{index}]") for index, item in enumerate(value)]}
    if isinstance(value, Mapping):
        if all(type(key) is str and key != _MARK for key in value):
            return {key: encode(item, f"{path}.{key}") for key, item in value.items()}
        pairs = [[encode(key, f"{path} key"), encode(item, f"{path}[{key!r}]")] for key, item in value.items()]
        return {_MARK: "dict", "items": pairs}
    if isinstance(value, (bytes, bytearray)):
        return {_MARK: "bytes", "data": _text(bytes(value))}
    if isinstance(value, torch.Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
        dtype = str(value.dtype).removeprefix("torch.")
        return {_MARK: "tensor", "dtype": dtype, "shape": list(value.shape), "data": _text(data)}
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.hasobject is False:
        array = np.asarray(value)
        kind = "array" if isinstance(value, np.ndarray) else "scalar"
        return {_MARK: kind, "dtype": array.dtype.str, "shape": list(array.shape), "data": _text(array.tobytes())}
    raise StoreError(
        f"{path} is a {type(value).__name__}, which a commit cannot hold; track objects whose state_dict has only "
        f"numbers, strings, bytes, lists, tuples, dicts, tensors and NumPy arrays"
    )


def decode(value: Any) -> Any:
    """The value that `encode` was given."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value.get(_MARK)
    if kind is None:
        return {key: decode(item) for key, item in value.items()}
    if kind == "tuple":
        return tuple(decode(item) for item in value["items"])
    if kind == "dict":
        return {decode(key): decode(item) for key, item in value["items"]}
    data = base64.b64decode(value["data"])
    if kind == "bytes":
        return data
    if kind == "tensor":
        dtype = getattr(torch, value["dtype"])
        flat = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return flat.reshape(value["shape"])
    if kind in ("array", "scalar"):
        array = np.frombuffer(data, dtype=np.dtype(value["dtype"])).reshape(value["shape"]).copy()
        return array if kind == "array" else array[()]
    raise StoreError(f"the manifest holds a value of unknown kind {kind!r}; it was written by a newer version")


def differences(stored: Any, given: Any, path: str = "") -> list[str]:
    """One line for every place where two JSON values differ, with both values."""
    if isinstance(stored, dict) and isinstance(given, dict):
        lines = []
        for key in sorted(stored.keys() | given.keys(), key=str):
            place = f"{path}.{key}" if path else str(key)
            if key not in given:
                lines.append(f"{place}: the store has {_short(stored[key])}, this run has none")
            elif key not in stored:
                lines.append(f"{place}: the store has none, this run has {_short(given[key])}")
            else:
                lines += differences(stored[key], given[key], place)
        return lines
    if isinstance(stored, list) and isinstance(given, list) and len(stored) == len(given):
        pairs = enumerate(zip(stored, given, strict=True))
        return [line for index, (left, right) in pairs for line in differences(left, right, f"{path}[{index}]")]
    if stored == given and type(stored) is type(given):
        return []
    return [f"{path}: the store has {_short(stored)}, this run has {_short(given)}"]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
