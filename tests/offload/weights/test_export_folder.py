"""The folder that `save_pretrained` writes takes the place of an old one, also after a kill in the middle of that."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from offload import SGD, OffloadConfig, OffloadEngine


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("point", [1, 2], ids=["before the first rename", "between the two"])
def test_killed_while_it_is_swapped_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: int) -> None:
    """The next save finds the old folder again, and keeps the files in it that are no weights."""
    original, folder, calls = Path.rename, tmp_path / "weights", 0

    def rename(self: Path, target: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls >= point:
            raise Killed
        return original(self, target)

    config = OffloadConfig(device="cpu", host_memory="64MiB", dtype=torch.float32)
    with OffloadEngine(nn.Linear(4, 4), SGD(lr=0.1), config) as engine:
        engine.save_pretrained(folder)
        (folder / "tokenizer.json").write_text("words")
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Path, "rename", rename)
            engine.save_pretrained(folder)
        engine.save_pretrained(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]
    assert sorted(path.name for path in folder.iterdir()) == ["model.safetensors", "tokenizer.json"]
    assert (folder / "tokenizer.json").read_text() == "words"
