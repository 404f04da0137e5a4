"""The model of a power cut: what must survive survives in every state, what may be lost is lost in some."""

import random
from pathlib import Path

import pytest

from offload.scheduler.storage import MemoryBackend, OperationLog, RecordingBackend, flush_fully, write_fully

ROOT = Path("drive")


def recording(lies=()):
    log = OperationLog()
    return RecordingBackend(MemoryBackend(ROOT), log, lies=frozenset(lies)), log


def states(log, tick=None, num=200):
    tick = log.now if tick is None else tick
    return [log.after_power_cut(tick, random.Random(seed)).get(ROOT, {}) for seed in range(num)]


def put(backend, name, data, offset=0, *, create=False):
    file = backend.open(name, create=create)
    write_fully(file, memoryview(data), offset)
    return file


def test_flushed_bytes_are_in_every_state_and_unflushed_ones_only_in_some():
    backend, log = recording()
    file = put(backend, "f", b"a" * 2048, create=True)
    flush_fully(file)
    backend.sync_directory()
    write_fully(file, memoryview(b"b" * 1024), 512)
    found = {state["f"] for state in states(log)}
    sectors = [b"a" * 512, b"b" * 512]
    assert found == {b"a" * 512 + x + y + b"a" * 512 for x in sectors for y in sectors}


def test_later_writes_may_be_there_without_earlier_ones_and_sectors_mix():
    backend, log = recording()
    file = put(backend, "f", b"-" * 1024, create=True)
    flush_fully(file)
    backend.sync_directory()
    for letter in (b"1", b"2"):
        write_fully(file, memoryview(letter * 512), 0)
    write_fully(file, memoryview(b"3" * 512), 512)
    found = {(state["f"][:1], state["f"][512:513]) for state in states(log)}
    assert found == {(x, y) for x in (b"-", b"1", b"2") for y in (b"-", b"3")}


def test_a_write_that_ends_after_the_flush_began_is_not_covered_by_it():
    backend, log = recording()
    put(backend, "f", b"a" * 512, create=True)
    backend.sync_directory()
    late = log.begin("write", ROOT, inode=log.inode(ROOT, "f"), offset=0, data=b"b" * 512)
    flush = log.begin("flush", ROOT, inode=log.inode(ROOT, "f"))
    log.end(late)
    log.end(flush)
    assert {state["f"] for state in states(log)} >= {b"a" * 512, b"b" * 512}


def test_a_flush_that_has_not_returned_promises_nothing():
    backend, log = recording()
    file = put(backend, "f", b"a" * 512, create=True)
    backend.sync_directory()
    flush_fully(file)
    flush = log.operations[-1]
    assert b"" in {state["f"] for state in states(log, tick=flush.end)}
    assert {state["f"] for state in states(log, tick=flush.end + 1)} == {b"a" * 512}


def test_names_are_sure_only_after_a_directory_flush():
    backend, log = recording()
    flush_fully(put(backend, "old", b"1", create=True))
    backend.sync_directory()
    flush_fully(put(backend, "new", b"2", create=True))
    backend.rename("new", "old")
    assert {tuple(sorted(state.items())) for state in states(log)} == {
        (("old", b"1"),), (("new", b"2"), ("old", b"1")), (("old", b"2"),)}  # fmt: skip
    backend.sync_directory()
    assert {tuple(sorted(state.items())) for state in states(log)} == {(("old", b"2"),)}


def test_removals_and_reservations_obey_the_same_rules():
    backend, log = recording()
    backend.reserve("f", 1024)
    backend.sync_directory()
    assert {len(state["f"]) for state in states(log)} >= {0, 1024}
    backend.open("f").flush()
    assert {state["f"] for state in states(log)} == {bytes(1024)}
    backend.remove("f")
    assert {"f" in state for state in states(log)} == {True, False}
    backend.sync_directory()
    assert {"f" in state for state in states(log)} == {False}


@pytest.mark.parametrize(("lie", "name", "data"), [("flush", "f", b""), ("sync", None, None)])
def test_a_lying_drive_loses_what_it_promised(lie, name, data):
    backend, log = recording([lie])
    flush_fully(put(backend, "f", b"a" * 512, create=True))
    backend.sync_directory()
    found = states(log)
    assert any(state.get("f") == data for state in found)
    assert any(state.get("f") == b"a" * 512 for state in found)


def test_the_inner_backend_really_holds_the_bytes():
    inner = MemoryBackend(ROOT)
    backend = RecordingBackend(inner, OperationLog())
    put(backend, "f", b"abc", create=True)
    backend.rename("f", "g")
    assert inner.contents() == {"g": b"abc"}
