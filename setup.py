"""Packaging: four top-level folders become one import package, and the native kernels are compiled where a compiler is.

offload/ -> offload, kernels/ -> offload.kernels, scheduler/ -> offload.scheduler, bench/ -> offload.bench. Nothing
generic such as `kernels` reaches site-packages. Everything that is plain data stands in pyproject.toml.
"""

import importlib.util
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.dist import Distribution

ROOT = Path(__file__).resolve().parent
ROOMS = {
    "offload": "offload",
    "offload.kernels": "kernels",
    "offload.scheduler": "scheduler",
    "offload.bench": "bench",
}
NATIVE = Path("kernels") / "native"


def packages() -> dict[str, str]:
    """Import name -> folder of every package in every room, sub-packages included."""
    found = {}
    for name, folder in ROOMS.items():
        found[name] = folder
        for inner in find_packages(str(ROOT / folder)):
            found[f"{name}.{inner}"] = f"{folder}/{inner.replace('.', '/')}"
    return found


def build_native(out_dir: Path) -> list[Path]:
    """Compile the native kernels into `out_dir`; without a working compiler say so in one line and go on.

    The library is optional: without it the same arithmetic runs through numba or in plain torch, slower. The
    compiler's own words are kept short here because the program repeats them in full whenever it falls back.
    """
    script = ROOT / NATIVE / "build.py"
    if not script.exists():
        print(f"offload: no native kernels: {script} is not part of this source tree")
        return []
    spec = importlib.util.spec_from_file_location("offload_native_build", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        library = Path(module.build(out_dir))
    except Exception as problem:  # a compiler can fail in any way, and none of them may stop the installation
        reason = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        print(f"offload: no native kernels ({reason}); numba or plain torch is used instead, slower")
        return []
    print(f"offload: native kernels: {library}")
    return [library]


class BuildPy(build_py):
    """Copies the packages, then puts the native library beside kernels/native: in the build folder, or in place."""

    native_outputs: list[str] = []

    def run(self) -> None:
        super().run()
        out_dir = ROOT / NATIVE if self.editable_mode else Path(self.build_lib) / "offload" / NATIVE
        out_dir.mkdir(parents=True, exist_ok=True)
        self.native_outputs = [str(path) for path in build_native(out_dir)]

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        outputs = super().get_outputs(include_bytecode)
        return outputs if self.editable_mode else [*outputs, *self.native_outputs]


class NativeDistribution(Distribution):
    """A wheel that may hold a compiled library belongs to one platform."""

    def has_ext_modules(self) -> bool:
        return True


FOUND = packages()
setup(
    packages=list(FOUND),
    package_dir=FOUND,
    package_data={name: ["py.typed", "*.c", "*.h", "*.toml"] for name in FOUND},
    cmdclass={"build_py": BuildPy},
    distclass=NativeDistribution,
)
