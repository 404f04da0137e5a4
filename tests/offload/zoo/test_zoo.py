"""Architectures that people fine-tune, unchanged, with everything on NVMe: the numbers of plain torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from .models import ARCHITECTURES
from .parity import Distance, distance, engine_run, plain_run, smallest_settings

FIRST, LOSSES, WEIGHTS, BUFFERS = 1e-6, 1e-6, 1e-3, 1e-5

every_architecture = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if a.is_fast else [pytest.mark.slow]) for n, a in ARCHITECTURES.items()]
)


@pytest.fixture(autouse=True)
def quiet() -> None:
    """Tiny configurations make transformers warn of sizes and of missing fast kernels."""
    import transformers

    transformers.logging.set_verbosity_error()


def assert_close(found: Distance) -> None:
    assert found.num_units >= 4
    assert found.first <= FIRST
    assert found.losses <= LOSSES
    assert found.weights <= WEIGHTS
    assert found.buffers <= BUFFERS


@every_architecture
def test_with_whole_blocks_as_units(name: str, tmp_path: Path, record_property: Callable[[str, Any], None]) -> None:
    """Every block is computed again in backward. First loss and gradients have torch's bits, unless the table says why
    they have not."""
    settings = {"device": "cpu", "nvme": tmp_path / "nvme", "host_memory": "256MiB", "activation_memory": 0}
    found = distance(engine_run(name, settings), plain_run(name))
    record_property("found", found)
    assert_close(found)
    assert found.first_bits == (not ARCHITECTURES[name].reason)


@every_architecture
@pytest.mark.parametrize("device", ["cpu", "fake"])
def test_with_the_smallest_window(
    name: str, device: str, tmp_path: Path, record_property: Callable[[str, Any], None]
) -> None:
    """The smallest budgets that work, which cut blocks into their parts."""
    settings = smallest_settings(name, {"device": device, "nvme": tmp_path / "nvme"})
    found = distance(engine_run(name, settings), plain_run(name))
    record_property("found", found)
    assert_close(found)
