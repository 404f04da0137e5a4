"""A call in another thread whose end can be waited for, whatever became of the coroutine that asked for it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Tracked(Generic[T]):
    """`work`, to be called at most once in a thread.

    Why: cancelling the asyncio future of an executor's call makes the waiter go on while the thread still moves bytes
    in or out of its buffer. The waiter calls `settled()` first, and the buffer is free when that returns.
    """

    def __init__(self, work: Callable[..., T]) -> None:
        self._work = work
        self._lock = threading.Lock()
        self._begun = False
        self._ended = False
        self._abandoned = False
        self._watcher: tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None = None

    def __call__(self, *args: Any) -> T:
        with self._lock:
            if self._abandoned:
                raise RuntimeError("this request was cancelled before it began")
            self._begun = True
        try:
            return self._work(*args)
        finally:
            with self._lock:
                self._ended = True
                if self._watcher is not None:
                    loop, future = self._watcher
                    loop.call_soon_threadsafe(_finish, future)

    async def settled(self) -> None:
        """Return once the call has ended or never will begin. Not to be hurried by further cancellation."""
        with self._lock:
            if not self._begun:
                self._abandoned = True
                return
            if self._ended:
                return
            loop = asyncio.get_running_loop()
            future: asyncio.Future[None] = loop.create_future()
            self._watcher = (loop, future)
        while not future.done():
            try:
                await asyncio.shield(future)
            except asyncio.CancelledError:
                continue


def _finish(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
