"""What the README and the examples show, runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"


def run_script(script: str | Path, folder: Path) -> str:
    """Standard output of a script run in `folder`, as a newcomer would run it."""
    path = script if isinstance(script, Path) else folder / "readme_example.py"
    if isinstance(script, str):
        path.write_text(script)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, cwd=folder, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def python_blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", README.read_text(), flags=re.MULTILINE | re.DOTALL)


def test_readme_example_runs_and_moves_bytes(tmp_path: Path) -> None:
    blocks = python_blocks()
    assert len(blocks) == 1
    lines = run_script(blocks[0], tmp_path).splitlines()
    steps = [re.fullmatch(r"step (\d+)  loss (\d+\.\d+)  read (\d+) B  written (\d+) B", line) for line in lines]
    assert all(steps)
    assert [int(step[1]) for step in steps if step] == list(range(1, len(steps) + 1))
    first, last = steps[0], steps[-1]
    assert first is not None
    assert last is not None
    assert float(last[2]) < float(first[2])
    assert int(last[3]) > 0
    assert int(last[4]) > 0


def test_readme_names_only_targets_and_files_that_exist() -> None:
    readme, makefile = README.read_text(), (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"`?make ([a-z][a-z-]*)", readme))
    assert {"run", "test"} <= targets
    assert targets <= set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    for link in re.findall(r"\]\(([^)#:]+)\)", readme):
        assert (ROOT / link).exists(), link


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_example_runs_and_learns(example: Path, tmp_path: Path) -> None:
    if "transformers" in example.read_text():
        pytest.importorskip("transformers", reason="EXAMPLE NOT RUN: no transformers; make setup-dev installs it")
    losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", run_script(example, tmp_path))]
    assert len(losses) >= 2
    assert losses[-1] < losses[0]
