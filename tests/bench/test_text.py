"""Corpora: what is read, how it is split, and that the same seed draws the same windows."""

from pathlib import Path

import numpy
import pytest
import torch

from offload.bench import text


def folder_of(tmp_path: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path


def test_standard_library_is_there_and_holds_python() -> None:
    corpus = text.read(None)
    assert corpus.num_files > 300
    assert corpus.num_files_left_out == 0
    assert len(corpus.train) > 5_000_000
    assert 0.01 < len(corpus.held_out) / len(corpus.train) < 0.15
    assert b"def __init__(self" in corpus.train.tobytes()


def test_split_is_by_whole_file_and_does_not_move_when_files_are_added(tmp_path: Path) -> None:
    names = [f"{index:03}.txt" for index in range(80)]
    root = folder_of(tmp_path, {name: f"<{name}>".encode() for name in names})
    before = text.read(root)
    held_out = {name for name in names if f"<{name}>".encode() in before.held_out.tobytes()}
    trained = {name for name in names if f"<{name}>".encode() in before.train.tobytes()}
    assert held_out | trained == set(names)
    assert held_out & trained == set()
    assert 1 <= len(held_out) <= 16
    folder_of(tmp_path, {f"more/{index}.txt": b"new" for index in range(40)})
    after = text.read(root).held_out.tobytes()
    assert all(f"<{name}>".encode() in after for name in held_out)


def test_what_is_not_text_is_left_out(tmp_path: Path) -> None:
    root = folder_of(
        tmp_path,
        {
            "a.txt": b"alpha" * 10,
            "b.txt": b"beta" * 10,
            "binary.bin": b"\x7fELF\0\0" + b"gamma" * 10,
            ".hidden": b"delta" * 10,
            "__pycache__/c.py": b"epsilon" * 10,
            "tests/d.py": b"zeta" * 10,
            "empty.txt": b"",
        },
    )
    corpus = text.read(root)
    assert corpus.num_files == 2
    both = bytes(corpus.train.tobytes() + corpus.held_out.tobytes())
    assert sorted(both) == sorted(b"alpha" * 10 + b"beta" * 10)


def test_folder_larger_than_the_limit_is_cut_at_a_file_and_says_so(tmp_path: Path) -> None:
    root = folder_of(tmp_path, {"a.txt": b"a" * 600, "b.txt": b"b" * 600, "c.txt": b"c" * 300})
    corpus = text.read_directory(root, max_nbytes=1000)
    assert (corpus.num_files, corpus.num_files_left_out) == (2, 1)
    assert set(bytes(corpus.train.tobytes() + corpus.held_out.tobytes())) == set(b"ac")


def test_single_file_is_mapped_and_its_end_held_out(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_bytes(bytes(range(1, 201)))  # a zero byte would make it a binary file
    for given in (path, tmp_path):
        corpus = text.read(given)
        assert isinstance(corpus.train, numpy.memmap)
        assert corpus.train.tolist() == list(range(1, 191))
        assert corpus.held_out.tolist() == list(range(191, 201))


def test_windows_are_pieces_of_the_text_and_repeat_with_the_seed(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_bytes(bytes(range(200)))
    corpus = text.read(path)
    drawn = corpus.windows(torch.Generator().manual_seed(3), batch=5, seq=7)
    assert drawn.dtype == torch.int64
    assert drawn.shape == (5, 8)
    assert torch.equal(drawn - drawn[:, :1], torch.arange(8).expand(5, 8))  # consecutive, as the text is
    assert int(drawn.max()) < 190  # never held-out bytes
    assert torch.equal(drawn, corpus.windows(torch.Generator().manual_seed(3), batch=5, seq=7))
    assert not torch.equal(drawn, corpus.windows(torch.Generator().manual_seed(4), batch=5, seq=7))


def test_window_may_be_the_whole_text(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_bytes(bytes(range(20)))
    assert text.read(path).windows(torch.Generator(), batch=2, seq=18).tolist() == [list(range(19))] * 2


def test_held_out_windows_span_the_held_out_text(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_bytes(bytes(index % 251 for index in range(4000)))
    corpus = text.read(path)  # the last 200 bytes are held out
    batches = [corpus.held_out_windows(index, batch=2, seq=9, num_batches=3) for index in range(3)]
    first, last = batches[0][0], batches[-1][-1]
    assert first.tolist() == corpus.held_out[:10].tolist()
    assert last.tolist() == corpus.held_out[-10:].tolist()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing", None, "does not exist"),
        ("empty.txt", b"", "is empty"),
        ("short.txt", b"abc", "expected at least 9 for windows of 8 bytes"),
    ],
)
def test_useless_input_is_refused(tmp_path: Path, name: str, content: bytes | None, words: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=words):
        text.read(path).windows(torch.Generator(), batch=1, seq=8)


def test_folder_without_text_is_refused(tmp_path: Path) -> None:
    folder_of(tmp_path, {"a.bin": b"\0\0"})
    with pytest.raises(ValueError, match="No text files under"):
        text.read(tmp_path)
