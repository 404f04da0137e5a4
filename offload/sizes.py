"""Sizes as people write them: "8GiB", "900MB", ints in bytes."""

from __future__ import annotations

import re

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")


def parse_size(value: str | int, name: str) -> int:
    """Bytes of `value`; `name` is the setting, for the message.

    Raises: ValueError for anything but a positive int or a string such as "8GiB" (2**30) or "900MB" (10**6).
    """
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    if isinstance(value, str):
        match = _SIZE.fullmatch(value)
        if match and match[2].upper() in _UNITS:
            nbytes = int(float(match[1]) * _UNITS[match[2].upper()])
            if nbytes > 0:
                return nbytes
    raise ValueError(
        f'{name}={value!r} is not a size; write a positive number of bytes, or a string such as "8GiB" (2**30) or '
        f'"900MB" (10**6)'
    )


def format_size(nbytes: float) -> str:
    """`nbytes` in the largest binary unit that keeps it above one, e.g. "1.50 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} TiB"
