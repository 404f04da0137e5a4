"""Train PyTorch models that do not fit: parameters, gradients and states stream across GPU, RAM and NVMe."""

from .config import OffloadConfig
from .engine import EngineClosed, EngineFailed, OffloadEngine
from .info import MemoryReport, StepInfo
from .optimizers import SGD, Adam, AdamW
from .placeholders import PlaceholderOverwritten
from .plan import BudgetTooSmall

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "BudgetTooSmall",
    "EngineClosed",
    "EngineFailed",
    "MemoryReport",
    "OffloadConfig",
    "OffloadEngine",
    "PlaceholderOverwritten",
    "StepInfo",
]
