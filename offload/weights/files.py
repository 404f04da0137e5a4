"""One safetensors file, written and read part by part, so that neither side ever holds a whole tensor.

Format: https://github.com/huggingface/safetensors (8 bytes with the header's length, a JSON header, the tensors one
after the other without holes).
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor
from xxhash import xxh3_64

DTYPE_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.int64: "I64",
    torch.uint64: "U64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_MAX_HEADER_NBYTES = 100_000_000  # what the format allows
_READ_NBYTES = 4 << 20

INDEX_NAME = "model.safetensors.index.json"


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the drive."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class TensorSpec:
    """What a file says of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        return cls(tensor.dtype, tuple(tensor.shape))

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class TensorFileWriter:
    """Writes a safetensors file whose tensors are all known beforehand. Blocks.

    Their space is reserved first, so a full drive is met before anything is written. Tensors lie in the order of their
    alignment, so that every one can be used where it is mapped.

    Args:
        metadata: strings that go into the header; {"format": "pt"} is what Hugging Face's loaders ask for.

    Attributes: path; nbytes, of the whole file.

    Raises: ValueError for a dtype that the format lacks; OSError, also for a file that exists.
    """

    def __init__(self, path: Path, tensors: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> None:
        self.path = path
        self._specs = dict(tensors)
        order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        self._starts: dict[str, int] = {}
        end = 0
        for name in order:
            spec = tensors[name]
            if spec.dtype not in DTYPE_NAMES:
                raise ValueError(f"{name!r} has dtype {spec.dtype}, which a safetensors file cannot hold; convert it")
            self._starts[name] = end
            offsets = [end, end := end + spec.nbytes]
            header[name] = {"dtype": DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        head = len(text).to_bytes(8, "little") + text
        self._data_start = len(head)
        self.nbytes = len(head) + end
        self.header_checksum = xxh3_64(head).hexdigest()
        self._written = dict.fromkeys(order, 0)
        self._hashes = {name: xxh3_64() for name in order}
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            os.posix_fallocate(self._descriptor, 0, self.nbytes)
            _write_all(self._descriptor, memoryview(head), 0)
        except BaseException:
            self.close()
            raise

    def write(self, name: str, part: Tensor) -> None:
        """Append the next elements, flat and in order, to tensor `name`; returns when the kernel has them.

        Raises: ValueError for another dtype or more elements than were announced; OSError.
        """
        spec, written = self._specs[name], self._written[name]
        if part.dtype != spec.dtype or written + part.numel() > spec.numel:
            raise ValueError(
                f"{name!r} was announced as {spec.numel} elements of {spec.dtype}; {part.numel()} of {part.dtype} came "
                f"after the first {written}"
            )
        view = bytes_of(part)
        _write_all(self._descriptor, view, self._data_start + self._starts[name] + written * spec.dtype.itemsize)
        self._hashes[name].update(view)
        self._written[name] = written + part.numel()

    def finish(self) -> dict[str, str]:
        """Flush the file to its drive and close it. Returns the XXH3 checksum of each tensor's bytes, by name.

        Raises: ValueError naming a tensor of which elements are missing; OSError.
        """
        for name, written in self._written.items():
            if written != self._specs[name].numel:
                raise ValueError(f"{self.path} got {written} of {self._specs[name].numel} elements of {name!r}")
        os.fsync(self._descriptor)
        os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # nobody reads it soon
        self.close()
        return {name: found.hexdigest() for name, found in self._hashes.items()}

    def close(self) -> None:
        """Give the file back, finished or not. Twice is safe."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> TensorFileWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class TensorFile:
    """Reads a safetensors file. The header is read and checked at once.

    Attributes: path; tensors, what the file holds, by name.

    Raises: OSError; ValueError naming the file if its header is damaged, or its length is not what the header says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._map: mmap.mmap | None = None
        try:
            self._head = self._read_head()
            self.tensors, self._starts = self._parse()
        except BaseException:
            self.close()
            raise

    def _read_head(self) -> bytes:
        first = os.pread(self._descriptor, 8, 0)
        nbytes = int.from_bytes(first, "little")
        if len(first) < 8 or nbytes > min(_MAX_HEADER_NBYTES, os.fstat(self._descriptor).st_size - 8):
            raise ValueError(f"{self.path} is torn or no safetensors file: its header does not fit into it")
        head = bytearray(first)
        while len(head) < 8 + nbytes:
            head += os.pread(self._descriptor, 8 + nbytes - len(head), len(head))
        return bytes(head)

    def _parse(self) -> tuple[dict[str, TensorSpec], dict[str, int]]:
        tensors, starts, end = {}, {}, 0
        try:
            for name, entry in json.loads(self._head[8:]).items():
                if name == "__metadata__":
                    continue
                tensors[name] = spec = TensorSpec(_DTYPES[entry["dtype"]], tuple(entry["shape"]))
                starts[name], stop = entry["data_offsets"]
                if stop - starts[name] != spec.nbytes:
                    raise ValueError(f"{name!r} has {stop - starts[name]} bytes, its shape needs {spec.nbytes}")
                end = max(end, stop)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the header of {self.path} is damaged ({error!r})") from error
        expected, found = len(self._head) + end, os.fstat(self._descriptor).st_size
        if found != expected:
            raise ValueError(f"{self.path} has {found} bytes, its header says {expected}")
        return tensors, starts

    @property
    def header_checksum(self) -> str:
        return str(xxh3_64(self._head).hexdigest())

    def checksums(self) -> Iterator[tuple[str, str]]:
        """(name, XXH3 checksum of the bytes), tensor by tensor as they lie; reads the whole file. Raises: OSError."""
        buffer = memoryview(bytearray(_READ_NBYTES))
        for name in sorted(self.tensors, key=self._starts.__getitem__):
            found = xxh3_64()
            offset, left = len(self._head) + self._starts[name], self.tensors[name].nbytes
            while left:
                done = os.preadv(self._descriptor, [buffer[: min(left, _READ_NBYTES)]], offset)
                if not done:
                    raise OSError(f"{self.path} ends in the middle of {name!r}; it was cut while it was read")
                found.update(buffer[:done])
                offset, left = offset + done, left - done
            yield name, found.hexdigest()

    def view(self, name: str) -> Tensor:
        """The tensor where the file is mapped: bytes come in as they are touched. It stays good after `close`.

        The map is private: writing to the tensor never reaches the file.
        """
        spec = self.tensors[name]
        if not spec.numel:
            return torch.empty(spec.shape, dtype=spec.dtype)
        if self._map is None:
            self._map = mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_COPY)
        offset = len(self._head) + self._starts[name]
        if offset % spec.dtype.itemsize:  # another program's file may not align its tensors
            raw = torch.frombuffer(self._map, dtype=torch.uint8, count=spec.nbytes, offset=offset)
            return raw.clone().view(spec.dtype).view(spec.shape)
        return torch.frombuffer(self._map, dtype=spec.dtype, count=spec.numel, offset=offset).view(spec.shape)

    def close(self) -> None:
        """Give the file back; what `view` returned keeps the map. Twice is safe."""
        self._map = None
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in host memory, shared with it where it is contiguous."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def checksum_of(tensor: Tensor) -> str:
    """XXH3 of the tensor's bytes, in hexadecimal; what `finish` and `checksums` give for one that was written."""
    return str(xxh3_64(bytes_of(tensor)).hexdigest())


def _write_all(descriptor: int, view: memoryview, offset: int) -> None:
    while view:
        done = os.pwrite(descriptor, view, offset)
        view, offset = view[done:], offset + done
