"""The background loop: results and exceptions reach the caller, closing waits for what runs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from offload.scheduler.loop import LoopThread


@pytest.fixture
def loop() -> Iterator[LoopThread]:
    loop = LoopThread("test-loop")
    yield loop
    loop.close()


def test_coroutines_run_in_one_other_thread(loop: LoopThread) -> None:
    async def where() -> str:
        await asyncio.sleep(0)
        return threading.current_thread().name

    assert {loop.run(where()) for _ in range(3)} == {"test-loop"}
    assert threading.current_thread().name != "test-loop"


def test_exceptions_reach_the_caller_and_the_loop_goes_on(loop: LoopThread) -> None:
    async def fail() -> None:
        raise OSError("drive")

    with pytest.raises(OSError, match="drive"):
        loop.run(fail())

    async def answer() -> int:
        return 42

    assert loop.run(answer()) == 42


def test_submit_does_not_block(loop: LoopThread) -> None:
    go_on = threading.Event()

    async def wait() -> str:
        await asyncio.to_thread(go_on.wait, 20)
        return "done"

    future = loop.submit(wait())
    assert not future.done()
    go_on.set()
    assert future.result(20) == "done"


def test_call_soon_runs_on_the_loop(loop: LoopThread) -> None:
    names: list[str] = []
    done = threading.Event()

    def note(extra: str) -> None:
        names.append(threading.current_thread().name + extra)
        done.set()

    loop.call_soon(note, "!")
    assert done.wait(20)
    assert names == ["test-loop!"]


def test_close_cancels_and_waits_for_clean_up() -> None:
    loop = LoopThread("test-loop")
    steps: list[str] = []
    begun = threading.Event()

    async def work() -> None:
        begun.set()
        try:
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(0.02)  # letting go of a buffer takes a moment
            steps.append("let go")

    future = loop.submit(work())
    assert begun.wait(20)
    loop.close()
    assert steps == ["let go"]
    assert future.cancelled()
    assert all(thread.name != "test-loop" for thread in threading.enumerate())


def test_use_after_close() -> None:
    loop = LoopThread("test-loop")
    loop.close()
    loop.close()
    assert loop.closed

    async def never() -> None:
        raise AssertionError("ran on a closed loop")

    coroutine = never()
    with pytest.raises(RuntimeError, match=r"closed; build a new engine"):
        loop.submit(coroutine)
    with pytest.raises(RuntimeError, match="cannot reuse already awaited coroutine"):
        coroutine.send(None)  # closed, not leaked
    loop.call_soon(pytest.fail, "ran on a closed loop")
