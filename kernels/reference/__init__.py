"""The definition of every kernel, in plain torch, and the path that runs where there is no compiler.

Only operations that are correctly rounded on their own (mul, add, sub, div, sqrt, casts) appear, so the bits are
defined; the other implementations must equal them. The work goes block by block: see `blocks`.
"""

from .gradient import (
    accumulate_,
    accumulate_squared_norm_,
    copy_,
    copy_squared_norm_,
    project_,
    projection_sums,
    scale_,
    squared_norm,
)
from .master import join_, split_
from .moments import adam_8bit_, adam_bf16_
from .optimizer import adam_, sgd_

__all__ = [
    "accumulate_",
    "accumulate_squared_norm_",
    "adam_",
    "adam_8bit_",
    "adam_bf16_",
    "copy_",
    "copy_squared_norm_",
    "join_",
    "project_",
    "projection_sums",
    "scale_",
    "sgd_",
    "split_",
    "squared_norm",
]
