"""Flags and small checks that several commands share."""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def count(least: int) -> Callable[[str], int]:
    """An argparse type: a whole number that is at least `least`."""

    def parse(value: str) -> int:
        try:
            number = int(value)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"{value!r} is not a whole number of at least {least}")
        return number

    return parse


def positive(value: str) -> float:
    """An argparse type: a finite number above zero."""
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if not 0.0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{value!r} is not a positive number")
    return number


def norm_limit(value: str) -> float | None:
    """An argparse type: a finite number above zero, or None for 0 (no limit)."""
    return None if value == "0" else positive(value)


def durability(value: str) -> str | int:
    """An argparse type: digits are an interval in steps; words are for the configuration to judge."""
    return int(value) if value.isdecimal() else value


def memory_size(value: str) -> str | int:
    """An argparse type: whole digits are bytes; the rest ("8GiB", "auto") is for the configuration to judge."""
    return int(value) if value.isdecimal() else value


def update_on(value: str) -> str | float:
    """An argparse type: a share between 0 and 1; words are for the configuration to judge."""
    try:
        return float(value)
    except ValueError:
        return value


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything as one JSON object to FILE")


def check_writable(path: Path | None, flag: str = "--json") -> None:
    """Refuse a result file that cannot be written before hours are spent on the result.

    Raises: ValueError if `path` is a folder, or its folder is missing or not writable.
    """
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"{flag} {str(path)!r} is a folder. Pass a file name, for example {str(path / 'run.json')!r}.")
    if not path.parent.is_dir():
        raise ValueError(f"{flag} {str(path)!r}: the folder {str(path.parent)!r} does not exist. Make it first.")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{flag} {str(path)!r} is not writable. Pass a file in a folder that is.")


def write_json(path: Path | None, content: dict[str, Any]) -> None:
    """Write `content` whole or not at all; numbers that JSON does not know (NaN, inf) become null."""
    if path is None:
        return
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(_finite(content), indent=1) + "\n")
    partial.replace(path)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value if isinstance(value, str | int | float | bool | type(None)) else str(value)
