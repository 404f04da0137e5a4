"""Train PyTorch models that do not fit: parameters, gradients and states stream across GPU, RAM and NVMe."""

from .checkpoint import (
    CheckpointDamaged,
    CheckpointError,
    CheckpointFailed,
    CheckpointMismatch,
    CheckpointMissing,
    Resumed,
)
from .config import OffloadConfig
from .engine import EngineClosed, EngineFailed, OffloadEngine
from .info import MemoryReport, StepInfo
from .loss_scale import DynamicLossScale
from .optimizers import SGD, Adam, AdamW
from .placeholders import PlaceholderOverwritten
from .plan import BudgetTooSmall
from .torch_optimizer import TorchOptimizer
from .weights.progress import FillProgress
from .weights.recorder import deferred_init
from .weights.source import ValueSource

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "BudgetTooSmall",
    "CheckpointDamaged",
    "CheckpointError",
    "CheckpointFailed",
    "CheckpointMismatch",
    "CheckpointMissing",
    "DynamicLossScale",
    "EngineClosed",
    "EngineFailed",
    "FillProgress",
    "MemoryReport",
    "OffloadConfig",
    "OffloadEngine",
    "PlaceholderOverwritten",
    "Resumed",
    "StepInfo",
    "TorchOptimizer",
    "ValueSource",
    "deferred_init",
]
