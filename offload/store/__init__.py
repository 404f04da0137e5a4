"""The store: units' bytes on drives, one committed step always whole. See docs/store-format.md."""

from .errors import (
    ChecksumError,
    NotResumable,
    StoreBroken,
    StoreBusy,
    StoreClosed,
    StoreCorrupt,
    StoreError,
    StoreExists,
    StoreMismatch,
    StoreMissing,
)
from .extent import Extent
from .statistics import StoreStatistics
from .store import Store

__all__ = [
    "ChecksumError",
    "Extent",
    "NotResumable",
    "Store",
    "StoreBroken",
    "StoreBusy",
    "StoreClosed",
    "StoreCorrupt",
    "StoreError",
    "StoreExists",
    "StoreMismatch",
    "StoreMissing",
    "StoreStatistics",
]
