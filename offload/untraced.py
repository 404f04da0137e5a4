"""Keeping `torch.compile` out: what runs here changes tensors and talks to other threads, which no trace can hold."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


_NEEDED = (
    "get_eval_frame_callback",
    "set_eval_frame",
    "set_code_exec_strategy",
    "_FrameExecStrategy",
    "_FrameAction",
)  # of torch 2.13; where one is gone, the slower way is taken


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, called by compiled code as it is. What is compiled by itself, inside of it, stays compiled.

    `torch.compiler.disable` does the same and loads the compiler for it, 150 MB of resident memory, in every process.
    """
    frames = torch._C._dynamo.eval_frame
    if not all(hasattr(frames, name) for name in _NEEDED):
        return torch.compiler.disable(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if frames.get_eval_frame_callback() is None:
            return function(*args, **kwargs)
        before = frames.set_eval_frame(None)
        try:
            return function(*args, **kwargs)
        finally:
            frames.set_eval_frame(before)

    skip = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.DEFAULT)
    frames.set_code_exec_strategy(call.__code__, skip)  # type: ignore[attr-defined]  # it is a function
    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    return call
