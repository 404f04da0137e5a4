"""One asyncio loop in one background thread; the training thread only submits coroutines and waits for results."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class LoopThread:
    """Owns the thread and its loop. `submit` may be called from any thread but the loop's own."""

    def __init__(self, name: str = "offload-loop") -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._closed = False
        self._thread.start()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    @property
    def closed(self) -> bool:
        return self._closed

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Start `coroutine` on the loop and return at once with a future of its result.

        Raises: RuntimeError if the loop is closed (the coroutine is closed, not leaked).
        """
        if self._closed:
            coroutine.close()
            raise RuntimeError("the engine's background loop is closed; build a new engine")
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run `coroutine` on the loop and block the caller until it returns or raises.

        Raises: RuntimeError on the loop's own thread, which would wait for itself.
        """
        if threading.current_thread() is self._thread:
            coroutine.close()
            raise RuntimeError(
                "LoopThread.run on the loop's own thread would wait for itself; await the coroutine there"
            )
        return self.submit(coroutine).result()

    def call_soon(self, callback: Any, *args: Any) -> None:
        """Run `callback(*args)` on the loop thread soon; never blocks."""
        if not self._closed:
            self._loop.call_soon_threadsafe(callback, *args)

    def close(self, grace_s: float = 30.0) -> None:
        """Cancel what is still running, wait for it to let go of its buffers, stop the thread. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        done = asyncio.run_coroutine_threadsafe(self._cancel_all(), self._loop)
        try:
            done.result(grace_s)
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(grace_s)
            if not self._thread.is_alive():
                self._loop.close()

    async def _cancel_all(self) -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
