"""Passes of the reference implementation over host memory take turns."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from offload.kernels.reference.blocks import one_pass


def test_two_threads_never_run_a_pass_at_once() -> None:
    inside, most = 0, 0
    ready = threading.Barrier(2)

    @one_pass
    def slow_pass() -> None:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.05)  # the other thread is at the door by now
        inside -= 1

    def work() -> None:
        ready.wait()
        slow_pass()

    with ThreadPoolExecutor(2) as executor:
        for future in [executor.submit(work) for _ in range(2)]:
            future.result()
    assert most == 1


def test_a_pass_that_fails_lets_the_next_one_in() -> None:
    @one_pass
    def failing() -> None:
        raise RuntimeError("in the middle")

    kept = []  # as a future keeps its exception, and with it the frames
    for _ in range(2):
        with pytest.raises(RuntimeError, match="in the middle") as caught:
            failing()
        kept.append(caught)
    assert len(kept) == 2
