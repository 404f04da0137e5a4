"""Safetensors files as one set of named tensors: a folder in Hugging Face's layout, an index file, or one file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from .export import SINGLE_NAME
from .files import INDEX_NAME, TensorFile, TensorSpec


class WeightFolder:
    """The tensors of a set of files, by name. Headers are read and checked at once, tensors later.

    Attributes:
        folder: where configuration files lie.
        tensors: what there is.
        file_of: which file holds it.

    Raises: ValueError for files that are not there, torn, or do not hold what the index says; OSError.
    """

    def __init__(self, path: Path) -> None:
        self.folder = path if path.is_dir() else path.parent
        self.tensors: dict[str, TensorSpec] = {}
        self.file_of: dict[str, Path] = {}
        index = _index_of(path)
        files = [_single_of(path)] if index is None else _files_of(index)
        for file in files:
            with TensorFile(file) as opened:
                for name, spec in opened.tensors.items():
                    self.tensors[name] = spec
                    self.file_of[name] = file
        if index is not None:
            _check_index(index, self.file_of)


def _index_of(path: Path) -> Path | None:
    """The index file that `path` is or holds; None without one."""
    if not path.exists():
        raise ValueError(f"{path} does not exist; name a folder with safetensors files, an index file or one such file")
    if path.is_file():
        return path if path.suffix == ".json" else None
    found = sorted(path.glob("*.safetensors.index.json"))
    if path / INDEX_NAME in found:
        return path / INDEX_NAME
    if len(found) > 1:
        raise ValueError(f"{path} holds several index files ({_names(found)}); name one of them")
    if (path / SINGLE_NAME).exists() or not found:
        return None
    return found[0]


def _single_of(path: Path) -> Path:
    if path.is_file():
        return path
    found = sorted(path.glob("*.safetensors"))
    if path / SINGLE_NAME in found:
        return path / SINGLE_NAME
    if len(found) != 1:
        there = _names(found) if found else _names(sorted(path.iterdir()))
        raise ValueError(
            f"{path} holds {len(found)} safetensors files and no index ({there}); name one file, or an index file. "
            "Weights in other formats have to be converted first"
        )
    return found[0]


def _files_of(index: Path) -> list[Path]:
    try:
        names: Mapping[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = [index.parent / name for name in dict.fromkeys(names.values())]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of safetensors files ({error!r}); restore it") from error
    absent = [file for file in files if not file.exists()]
    if absent:
        raise ValueError(f"{index} names files that are not there: {_names(absent)}; fetch them, or restore them")
    return files


def _check_index(index: Path, file_of: Mapping[str, Path]) -> None:
    listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    wrong = [name for name, file in listed.items() if file_of.get(name) != index.parent / file]
    if wrong:
        raise ValueError(
            f"{index} lists {len(wrong)} tensors that are not in the file it names, among them {wrong[0]!r}; the files "
            "are of different versions: fetch all of them anew"
        )


def _names(paths: list[Path]) -> str:
    shown = ", ".join(path.name for path in paths[:5])
    return shown + (f" and {len(paths) - 5} more" if len(paths) > 5 else "")
