"""Fences: points behind which a buffer may be used again."""

from __future__ import annotations

from typing import Protocol


class Fence(Protocol):
    """Work that was given to a device; it has passed when the work has run."""

    def has_passed(self) -> bool:
        """Whether the work has run. Never blocks."""

    def synchronize(self) -> None:
        """Block the calling thread until the work has run."""
