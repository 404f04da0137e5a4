"""The four folders install as one package, with the native library where a compiler is and without it elsewhere."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("offload", "kernels", "scheduler", "bench", "setup.py", "pyproject.toml", "README.md", "LICENSE")


def build_wheel(tmp_path: Path, compiler: str | None) -> tuple[list[str], str]:
    """Names in a wheel built from a copy of the tree, and what the build printed."""
    tree = tmp_path / "tree"
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.dylib", "*.egg-info")
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, tree / part, ignore=ignore)
        else:
            tree.mkdir(exist_ok=True)
            shutil.copy(source, tree / part)
    environment = {**os.environ, **({"CC": compiler} if compiler else {})}
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "-w", str(tmp_path / "out"), str(tree)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tmp_path / "out").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist(), done.stdout + done.stderr


def native_libraries(names: list[str]) -> list[str]:
    return [name for name in names if name.startswith("offload/kernels/native/") and name.endswith((".so", ".dylib"))]


@pytest.mark.timeout(400)  # compiles the native kernels: ten seconds on an idle machine
def test_wheel_holds_one_top_level_package_and_its_data(tmp_path: Path) -> None:
    names, _ = build_wheel(tmp_path, compiler=None)
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"offload"}
    for room, prefix in (("offload", ""), ("kernels", "kernels/"), ("scheduler", "scheduler/"), ("bench", "bench/")):
        modules = [path.relative_to(ROOT / room).as_posix() for path in (ROOT / room).rglob("*.py")]
        missing = {f"offload/{prefix}{module}" for module in modules} - set(names)
        assert missing == set()
    assert "offload/py.typed" in names
    if shutil.which("cc") or shutil.which("gcc") or shutil.which("clang"):
        assert len(native_libraries(names)) == 1


def test_wheel_builds_without_a_compiler_and_says_so(tmp_path: Path) -> None:
    names, output = build_wheel(tmp_path, compiler=str(tmp_path / "no-such-compiler"))
    assert native_libraries(names) == []
    notices = [line for line in output.splitlines() if "no native kernels" in line]
    assert len(notices) == 1
    assert "numba or plain torch is used instead" in notices[0]


@pytest.mark.parametrize(
    "command", [["-m", "offload"], ["-c", "from offload.bench.cli import main; raise SystemExit(main())"]]
)
def test_both_doors_lead_to_the_command_line(command: list[str]) -> None:
    done = subprocess.run([sys.executable, "-P", *command, "--help"], capture_output=True, text=True, check=True)
    assert "train" in done.stdout
    assert done.stdout.startswith("usage: offload")
