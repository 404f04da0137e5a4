"""Compile the native kernels into one shared library with the system's C compiler.

Needs only the standard library, so that an installer can load this file by path and call `build` without importing
torch or the package around it. The library has a plain C interface: one build serves every Python and every torch.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

SOURCE = Path(__file__).with_name("kernels.c")
LIBRARY_NAME = "libofflkernels.so"

# -ffp-contract=off: a fused multiply-add rounds once where the definition of the kernels rounds twice.
# -fno-math-errno, -fno-trapping-math: let sqrt and selects vectorise; neither changes a result.
FLAGS = (
    "-O3",
    "-std=gnu11",
    "-shared",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-unswitch-loops",  # selects on a hyperparameter are cheap; a copy of the loop for each costs build time
)
X86_FLAGS = ("-mprefer-vector-width=512",)


class BuildError(RuntimeError):
    """There is no C compiler, or it failed; the message holds its words."""


def source_hash() -> str:
    """First 16 hex digits of the SHA-256 of the C source and the flags: names one build."""
    digest = hashlib.sha256(SOURCE.read_bytes())
    digest.update("\0".join(_flags()).encode())
    return digest.hexdigest()[:16]


def find_compiler() -> list[str] | None:
    """The compiler as the start of a command: `$CC` if set, else the first of cc, gcc, clang on the path."""
    if chosen := os.environ.get("CC", "").split():
        return chosen if shutil.which(chosen[0]) else None
    for name in ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            return [found]
    return None


def build(out_dir: Path | str, cc: str | Sequence[str] | None = None) -> Path:
    """Compile `kernels.c` into `out_dir` and return the path of the library.

    The library appears under its name only when it is whole: it is written beside it and renamed.

    Args:
        out_dir: made if missing.
        cc: compiler command; by default what `find_compiler` finds.
    Raises: BuildError without a working compiler; OSError where `out_dir` cannot be written.
    """
    command = [cc] if isinstance(cc, str) else list(cc) if cc else find_compiler()
    if not command:
        raise BuildError("No C compiler: set CC, or install gcc or clang.")
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    descriptor, partial = tempfile.mkstemp(dir=out_dir, prefix=LIBRARY_NAME, suffix=".partial")
    os.close(descriptor)
    try:
        _compile(command, Path(partial))
        os.chmod(partial, 0o755)
        os.replace(partial, out_dir / LIBRARY_NAME)
    finally:
        Path(partial).unlink(missing_ok=True)
    return out_dir / LIBRARY_NAME


def _flags() -> tuple[str, ...]:
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return FLAGS + (X86_FLAGS if is_x86 else ())


def _compile(command: list[str], target: Path) -> None:
    arguments = [*command, *_flags(), f'-DOFFL_SOURCE_HASH="{source_hash()}"', str(SOURCE), "-lm", "-o", str(target)]
    try:
        result = subprocess.run(arguments, capture_output=True, text=True, timeout=300, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"The C compiler {command[0]!r} could not be run: {error}") from error
    if result.returncode != 0:
        raise BuildError(f"The C compiler {command[0]!r} failed ({result.returncode}): {result.stderr.strip()[-2000:]}")


if __name__ == "__main__":
    print(build(SOURCE.parent))
