"""Rules that hold for every test: where imports come from, and that skipped GPU tests are seen."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config: pytest.Config) -> None:
    """Refuse to run with the project's root on sys.path: its kernels/ would answer to a bare `import kernels`."""
    del config
    if any(Path(entry or ".").resolve() == ROOT for entry in sys.path):
        raise pytest.UsageError(
            f"{ROOT} is on sys.path, so tests would not see the package as it is installed. "
            f"Run the pytest executable (make test), not python -m pytest, and take the root out of PYTHONPATH."
        )


def pytest_report_header() -> list[str]:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "none"
    return [f"torch {torch.__version__}, {torch.get_num_threads()} threads, accelerator {accelerator}"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.accelerator.is_available():
        return
    skip = pytest.mark.skip(reason="GPU TEST NOT RUN: no accelerator here; run make test-gpu on a machine with one")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)
