"""Short, interrupted and failing requests: continued, repeated a stated number of times, then named."""

import errno
from pathlib import Path

import pytest

from offload.scheduler.storage import (
    NUM_RETRIES,
    Fault,
    FaultyBackend,
    MemoryBackend,
    OffloadIOError,
    flush_fully,
    read_fully,
    write_fully,
)

DATA = bytes(range(256)) * 33  # 8448 bytes, no whole number of pages


def faulty(*faults):
    return FaultyBackend(MemoryBackend(Path("drive"), files={"f": DATA}), faults).open("f")


def move(file, operation):
    """Run one whole transfer over all of the file and return (retries, bytes on the far side)."""
    buffer = bytearray(len(DATA))
    if operation == "read":
        return read_fully(file, memoryview(buffer), 0), bytes(buffer)
    retries = write_fully(file, memoryview(DATA[::-1]), 0)
    read_fully(file, memoryview(buffer), 0)
    return retries, bytes(buffer)


EXPECTED = {"read": DATA, "write": DATA[::-1]}
both = pytest.mark.parametrize("operation", ["read", "write"])


@both
@pytest.mark.parametrize("limit", [1, 7, 512, 4096, 8447])
def test_short_transfers_are_continued(operation, limit):
    fault = Fault(operation=operation, at_most_nbytes=limit, times=None)
    assert move(faulty(fault), operation) == (0, EXPECTED[operation])
    assert fault.hits == -(-len(DATA) // limit)


@both
def test_interrupts_are_repeated_without_end(operation):
    fault = Fault(operation=operation, interrupt=True, times=50)
    assert move(faulty(fault), operation) == (0, EXPECTED[operation])
    assert fault.hits == 50


@both
@pytest.mark.parametrize("number", [errno.EIO, errno.EAGAIN, errno.ETIMEDOUT])
def test_passing_errors_are_retried(operation, number, monkeypatch):
    monkeypatch.setattr("offload.scheduler.storage.transfer.RETRY_PAUSE_S", 0.0)
    fault = Fault(operation=operation, number=number, times=NUM_RETRIES)
    assert move(faulty(fault), operation) == (NUM_RETRIES, EXPECTED[operation])


@both
def test_lasting_errors_are_raised_with_everything_a_user_needs(operation, monkeypatch):
    monkeypatch.setattr("offload.scheduler.storage.transfer.RETRY_PAUSE_S", 0.0)
    short = Fault(operation=operation, at_most_nbytes=4096)
    broken = Fault(operation=operation, number=errno.EIO, times=None, skip=1)
    with pytest.raises(
        OffloadIOError, match=r"failed after 3 retries: EIO at bytes 4096\.\.8448 of drive/f;"
    ) as caught:
        move(faulty(short, broken), operation)
    error = caught.value
    assert (error.path, error.offset, error.nbytes, error.errno) == (Path("drive/f"), 4096, 4352, errno.EIO)
    assert "kernel log" in error.mend
    assert broken.hits == NUM_RETRIES + 1


@both
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EBADF])
def test_errors_that_do_not_pass_are_not_retried(operation, number):
    fault = Fault(operation=operation, number=number, times=None)
    with pytest.raises(OffloadIOError) as caught:
        move(faulty(fault), operation)
    assert (caught.value.errno, fault.hits) == (number, 1)


def test_a_write_that_takes_nothing_is_an_error_and_not_an_endless_loop():
    with pytest.raises(OffloadIOError, match="writing moved 0 of 8448 bytes"):
        move(faulty(Fault(operation="write", at_most_nbytes=0, times=None)), "write")


def test_a_backend_that_claims_more_than_was_asked_is_not_believed():
    class Boasting:
        path = Path("f")

        def read_into(self, buffer, offset):
            return len(buffer) + 1

    with pytest.raises(OffloadIOError, match="moved 101 of 100 bytes"):
        read_fully(Boasting(), memoryview(bytearray(100)), 0)


def test_a_failed_flush_is_never_retried():
    fault = Fault(operation="flush", number=errno.EIO, times=1)
    with pytest.raises(OffloadIOError, match="flushing failed"):
        flush_fully(faulty(fault))
    assert fault.hits == 1
    again = Fault(operation="flush", interrupt=True, times=3)
    flush_fully(faulty(again))
    assert again.hits == 3


def test_unknown_operations_are_refused():
    with pytest.raises(ValueError, match="not one of read, write"):
        Fault(operation="raed")
