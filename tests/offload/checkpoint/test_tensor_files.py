"""The streaming safetensors files, against the safetensors library in both directions."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

from offload.weights.files import DTYPE_NAMES, TensorFile, TensorFileWriter, TensorSpec, checksum_of


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    found = {f"of.{name}": torch.randint(0, 2, (3, 5)).to(dtype) for dtype, name in DTYPE_NAMES.items()}
    found |= {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4), "long": torch.randn(1_500_000)}
    return found


def written(path: Path, wanted: dict[str, torch.Tensor], part: int = 400_000) -> dict[str, str]:
    with TensorFileWriter(path, {name: TensorSpec.of(t) for name, t in wanted.items()}, {"format": "pt"}) as writer:
        for name, tensor in reversed(wanted.items()):
            flat = tensor.reshape(-1)
            for first in range(0, flat.numel(), part):
                writer.write(name, flat[first : first + part])
        checksums = writer.finish()
        assert path.stat().st_size == writer.nbytes
    return checksums


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    wanted = tensors()
    checksums = written(tmp_path / "a.safetensors", wanted)
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert checksum_of(found[name]) == checksum_of(tensor) == checksums[name]
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    wanted = tensors()
    save_file(wanted, tmp_path / "b.safetensors")
    with TensorFile(tmp_path / "b.safetensors") as file:
        assert {name: TensorSpec.of(tensor) for name, tensor in wanted.items()} == file.tensors
        assert dict(file.checksums()) == {name: checksum_of(tensor) for name, tensor in wanted.items()}
        views = {name: file.view(name) for name in wanted}
    for name, tensor in wanted.items():  # they outlive the file
        assert checksum_of(views[name]) == checksum_of(tensor)
    views["long"].zero_()  # and writing to one is nobody else's business
    assert checksum_of(load_file(tmp_path / "b.safetensors")["long"]) == checksum_of(wanted["long"])


def test_every_tensor_is_aligned(tmp_path: Path) -> None:
    wanted = tensors()
    written(tmp_path / "a.safetensors", wanted)
    with TensorFile(tmp_path / "a.safetensors") as file:
        assert [n for n, t in wanted.items() if t.numel() and file.view(n).data_ptr() % t.dtype.itemsize] == []


def test_a_writer_takes_what_was_announced_and_no_more(tmp_path: Path) -> None:
    spec = {"a": TensorSpec(torch.float32, (4,))}
    with TensorFileWriter(tmp_path / "a", spec, {}) as writer:
        writer.write("a", torch.zeros(3))
        with pytest.raises(
            ValueError, match=r"'a' was announced as 4 elements.*2 of torch.float32 came after the first 3"
        ):
            writer.write("a", torch.zeros(2))
        with pytest.raises(ValueError, match=r"1 of torch.float64 came"):
            writer.write("a", torch.zeros(1, dtype=torch.float64))
        with pytest.raises(ValueError, match="got 3 of 4 elements of 'a'"):
            writer.finish()
    with pytest.raises(FileExistsError):
        TensorFileWriter(tmp_path / "a", spec, {})
    with pytest.raises(ValueError, match=r"has dtype torch\.complex128"):
        TensorFileWriter(tmp_path / "b", {"c": TensorSpec(torch.complex128, (1,))}, {})
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "torn or no safetensors file"),
        (b"\x00\x01\x00\x00\x00\x00\x00\x00{}", "torn or no safetensors file"),
        (b"\x02\x00\x00\x00\x00\x00\x00\x00[]", "header of .* is damaged"),
        (b"\x02\x00\x00\x00\x00\x00\x00\x00{}x", "has 11 bytes, its header says 10"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        TensorFile(tmp_path / "a")


def test_a_header_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}'
    (tmp_path / "a").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ValueError, match="has 4 bytes, its shape needs 8"):
        TensorFile(tmp_path / "a")
