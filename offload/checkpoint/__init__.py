"""Checkpoints: folders that hold one finished step, whole, and can be kept, copied and moved."""

from .checkpoints import Checkpoints
from .errors import CheckpointDamaged, CheckpointError, CheckpointFailed, CheckpointMismatch, CheckpointMissing
from .loading import Resumed

__all__ = [
    "CheckpointDamaged",
    "CheckpointError",
    "CheckpointFailed",
    "CheckpointMismatch",
    "CheckpointMissing",
    "Checkpoints",
    "Resumed",
]
