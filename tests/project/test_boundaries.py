"""Imports go down only: bench -> offload -> scheduler, kernels; and the rooms are importable as `offload.*` alone."""

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAY_IMPORT = {
    "kernels": {"kernels"},
    "scheduler": {"scheduler"},
    "offload": {"offload", "kernels", "scheduler"},
    "bench": {"bench", "offload", "kernels", "scheduler"},
}
THE_DOOR = "offload/__main__.py"  # python -m offload is the command line, which lives in bench


def imported_modules(source: str, module: str, *, is_package: bool) -> Iterator[str]:
    """Absolute names of everything that `source`, which is `module`, imports anywhere in it."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = importlib.util.resolve_name("." * node.level + base, package)
            yield from (f"{base}.{alias.name}" for alias in node.names)  # judged by where the name ends


def room_of(module: str) -> str | None:
    """The room that an absolute module name lies in; None for other people's packages."""
    parts = module.split(".")
    if parts[0] != "offload":
        return f"bare {parts[0]}" if parts[0] in ("kernels", "scheduler", "bench", "tests") else None
    return parts[1] if len(parts) > 1 and parts[1] in ("kernels", "scheduler", "bench") else "offload"


def forbidden(room: str, source: str, module: str, *, is_package: bool = False) -> set[str]:
    """Names that a file of `room` imports and may not."""
    names = imported_modules(source, module, is_package=is_package)
    return {name for name in names if (where := room_of(name)) is not None and where not in MAY_IMPORT[room]}


def sources() -> Iterator[tuple[str, Path]]:
    for room in MAY_IMPORT:
        yield from ((room, path) for path in sorted((ROOT / room).rglob("*.py")))


def module_name(room: str, path: Path) -> str:
    inner = path.relative_to(ROOT / room).with_suffix("").parts
    parts = ["offload"] if room == "offload" else ["offload", room]
    return ".".join(parts + [part for part in inner if part != "__init__"])


def test_every_room_imports_downwards_only() -> None:
    seen, wrong = set(), {}
    for room, path in sources():
        where = path.relative_to(ROOT).as_posix()
        seen.add(room)
        found = forbidden(room, path.read_text(), module_name(room, path), is_package=path.name == "__init__.py")
        if where == THE_DOOR:
            found = {name for name in found if room_of(name) != "bench"}
        if found:
            wrong[where] = sorted(found)
    assert wrong == {}
    assert seen == set(MAY_IMPORT)


@pytest.mark.parametrize(
    ("room", "module", "source"),
    [
        ("kernels", "offload.kernels.optimizer", "from ..scheduler import pool"),
        ("kernels", "offload.kernels.optimizer", "import offload.config"),
        ("kernels", "offload.kernels.optimizer", "from offload import OffloadConfig"),
        ("scheduler", "offload.scheduler.devices.fake", "from ...kernels.master import split_"),
        ("scheduler", "offload.scheduler.pool", "def late():\n    from .. import units"),
        ("offload", "offload.engine", "from .bench import train"),
        ("offload", "offload.engine", "import kernels"),
        ("bench", "offload.bench.train", "import scheduler"),
    ],
)
def test_an_import_upwards_or_bare_is_found(room: str, module: str, source: str) -> None:
    assert forbidden(room, source, module)


@pytest.mark.parametrize(
    ("room", "module", "source"),
    [
        ("kernels", "offload.kernels.optimizer", "from .native import library\nimport torch"),
        ("offload", "offload.engine", "from .kernels.optimizer import adam_\nfrom .scheduler import pool"),
        ("bench", "offload.bench.train", "from offload import AdamW\nfrom .models.gpt import GPT"),
    ],
)
def test_an_import_downwards_is_allowed(room: str, module: str, source: str) -> None:
    assert forbidden(room, source, module) == set()


@pytest.mark.parametrize("name", ["kernels", "scheduler", "bench"])
def test_no_room_is_importable_by_its_bare_name(name: str) -> None:
    assert importlib.util.find_spec(name) is None


@pytest.mark.parametrize("name", ["kernels", "scheduler", "bench"])
def test_every_room_is_importable_inside_the_package(name: str) -> None:
    spec = importlib.util.find_spec(f"offload.{name}")
    assert spec is not None
    assert spec.origin is not None


def test_importing_the_package_does_not_import_the_command_line() -> None:
    script = "import sys, offload; print(sorted(name for name in sys.modules if name.startswith('offload.bench')))"
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
