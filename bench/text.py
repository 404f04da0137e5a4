"""Real text as training data: bytes of files, split by file, drawn as seeded random windows."""

import os
import sysconfig
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy
import torch
from torch import Tensor

MAX_DIRECTORY_NBYTES = 256 * 2**20  # what a folder may put into memory; a single larger file is memory-mapped instead
HELD_OUT_SHARE = 20  # one file in so many is held out, or the last 1/20 of a single file
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})


@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """Bytes to learn from and bytes to be tested on.

    `train` and `held_out` are uint8 [n] (a memory map for a single large file). `num_files` were read and
    `num_files_left_out` did not fit in `MAX_DIRECTORY_NBYTES`.
    """

    source: str
    train: numpy.ndarray
    held_out: numpy.ndarray
    num_files: int
    num_files_left_out: int = 0

    def windows(self, generator: torch.Generator, *, batch: int, seq: int) -> Tensor:
        """Random windows of the training bytes, int64 [batch, seq + 1]; the generator decides which.

        Raises: ValueError if there are fewer than seq + 1 training bytes.
        """
        last = self._last_start(self.train, seq, "training")
        starts = torch.randint(0, last + 1, (batch,), generator=generator)
        return _stack(self.train, starts.tolist(), seq)

    def held_out_windows(self, index: int, *, batch: int, seq: int, num_batches: int) -> Tensor:
        """Batch `index` of `num_batches` evenly spaced held-out batches, int64 [batch, seq + 1]; always the same.

        Raises: ValueError if there are fewer than seq + 1 held-out bytes.
        """
        last = self._last_start(self.held_out, seq, "held-out")
        num_windows = num_batches * batch
        starts = [(index * batch + row) * last // max(1, num_windows - 1) for row in range(batch)]
        return _stack(self.held_out, starts, seq)

    def _last_start(self, data: numpy.ndarray, seq: int, what: str) -> int:
        if len(data) < seq + 1:
            raise ValueError(
                f"{self.source} has {len(data)} {what} bytes, expected at least {seq + 1} for windows of {seq} bytes. "
                f"Pass more text with --text or a shorter --seq."
            )
        return len(data) - seq - 1


def _stack(data: numpy.ndarray, starts: list[int], seq: int) -> Tensor:
    rows = numpy.stack([data[start : start + seq + 1] for start in starts])
    return torch.from_numpy(rows.astype(numpy.int64))


def standard_library() -> Corpus:
    """The .py files of the running Python's standard library: always there, nothing to download."""
    return read_directory(Path(sysconfig.get_path("stdlib")), suffix=".py")


def read(path: str | Path | None) -> Corpus:
    """The corpus at `path`: a file, every text file under a folder, or the standard library for None.

    Raises: ValueError if the path is missing, is neither file nor folder, or holds no text.
    """
    if path is None:
        return standard_library()
    path = Path(path)
    if path.is_dir():
        return read_directory(path)
    if path.is_file():
        return read_file(path)
    what = "is neither a file nor a folder" if path.exists() else "does not exist"
    raise ValueError(f"Text {str(path)!r} {what}. Pass --text a file or a folder of text files.")


def read_file(path: Path) -> Corpus:
    """One file, memory-mapped: its last twentieth is held out.

    Raises: ValueError if the file is empty.
    """
    size_nbytes = path.stat().st_size
    if size_nbytes == 0:
        raise ValueError(f"Text {str(path)!r} is empty, expected at least one window of bytes. Pass another --text.")
    data = numpy.memmap(path, dtype=numpy.uint8, mode="r")
    cut = size_nbytes - max(1, size_nbytes // HELD_OUT_SHARE)
    return Corpus(source=str(path), train=data[:cut], held_out=data[cut:], num_files=1)


def read_directory(root: Path, *, suffix: str = "", max_nbytes: int = MAX_DIRECTORY_NBYTES) -> Corpus:
    """Every text file under `root` whose name ends in `suffix`, in the order of names, up to `max_nbytes` in all.

    Hidden files, binary files (a zero byte in the first 4096) and folders of tests, caches and installed packages
    are skipped. A file is held out when a checksum of its relative name says so, so the split does not move when
    files are added. With one file the split is that of `read_file`.

    Raises: ValueError if no text file is found.
    """
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    read_paths: list[Path] = []
    read_nbytes = num_left_out = 0
    for path in _text_paths(root, suffix):
        content = _read_text(path, limit_nbytes=max_nbytes - read_nbytes)
        if content is None:
            num_left_out += 1
        elif content:
            held_out = zlib.crc32(path.relative_to(root).as_posix().encode()) % HELD_OUT_SHARE == 0
            parts[held_out].append(content)
            read_paths.append(path)
            read_nbytes += len(content)
    if not read_paths:
        raise ValueError(
            f"No text files{f' ending in {suffix}' if suffix else ''} under {str(root)!r} "
            f"({num_left_out} larger than the limit of {max_nbytes} bytes). Pass --text a file or a folder of text."
        )
    if len(read_paths) == 1:
        return replace(read_file(read_paths[0]), num_files_left_out=num_left_out)
    for wanted, other in ((True, False), (False, True)):  # a small folder may have hashed all to one side
        if not parts[wanted]:
            parts[wanted].append(parts[other].pop())
    return Corpus(
        source=str(root),
        train=numpy.frombuffer(b"\n".join(parts[False]), dtype=numpy.uint8),
        held_out=numpy.frombuffer(b"\n".join(parts[True]), dtype=numpy.uint8),
        num_files=len(read_paths),
        num_files_left_out=num_left_out,
    )


def _text_paths(root: Path, suffix: str) -> list[Path]:
    found: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in SKIPPED_FOLDERS and not name.startswith("."))
        found.extend(Path(folder, name) for name in names if name.endswith(suffix) and not name.startswith("."))
    return sorted(path for path in found if path.is_file())


def _read_text(path: Path, *, limit_nbytes: int) -> bytes | None:
    """The file's bytes, b"" for a binary or empty file, None if it is larger than the limit."""
    with path.open("rb") as file:
        head = file.read(4096)
        if b"\0" in head:
            return b""
        if path.stat().st_size > limit_nbytes:
            return None
        return head + file.read()
