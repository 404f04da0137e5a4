"""Batches through the kernel's asynchronous I/O: the same bytes, errors and retries as one by one."""

import errno
import os
import random
import threading

import numpy as np
import pytest

from offload.scheduler.hostmem import allocate_pages
from offload.scheduler.storage import (
    Fault,
    FaultyBackend,
    OffloadIOError,
    PosixBackend,
    ReadBatch,
    address_of,
    view_of,
)
from offload.scheduler.storage import batch as batch_module

PAGE = 4096


def build(tmp_path, num_pages=64, direct=True):
    data = random.Random(1).randbytes(num_pages * PAGE)
    (tmp_path / "f").write_bytes(data)
    return data, PosixBackend(tmp_path, direct=direct)


def views_of(num, nbytes=PAGE):
    buffer = view_of(allocate_pages(num * nbytes))
    return [buffer[i * nbytes : (i + 1) * nbytes] for i in range(num)]


def batch_of(files, views, offsets):
    known = list(dict.fromkeys(files))
    return ReadBatch(
        files=known,
        file=np.array([known.index(file) for file in files]),
        offset=np.array(offsets),
        address=np.array([address_of(view) for view in views]),
        nbytes=np.array([len(view) for view in views]),
    )


def read_batch(files, views, offsets):
    """Reads, and checks that every read was looked at once its bytes were there."""
    num_retries, seen = batch_module.read_batch(batch_of(files, views, offsets), lambda view: bytes(view))
    assert seen == [bytes(view) for view in views]
    return num_retries


@pytest.mark.parametrize("num", [1, 2, 63, 64, 65, 1000])
def test_every_view_gets_its_own_bytes(tmp_path, num):
    data, backend = build(tmp_path)
    file, views = backend.open("f"), views_of(num, 2 * PAGE)
    offsets = [random.Random(num).randrange(62) * PAGE for _ in range(num)]
    assert read_batch([file] * num, views, offsets) == 0
    assert all(view == data[o : o + 2 * PAGE] for view, o in zip(views, offsets, strict=True))
    file.close()


def test_the_kernel_reads_them_together_where_it_can(tmp_path):
    data, backend = build(tmp_path)
    file, views = backend.open("f"), views_of(100)
    if not batch_module.supported() or batch_module._context() is None:
        pytest.skip("no kernel asynchronous I/O here")
    batch = batch_of([file] * 100, views, [0] * 100)
    descriptors, every = np.array([file.direct_descriptor]), np.arange(100)
    done = batch_module._read_together(batch, every, descriptors, batch.views(), None, [None] * 100)
    assert sorted(done) == list(range(100))
    assert all(view == data[:PAGE] for view in views)
    file.close()


@pytest.mark.parametrize("trouble", ["no context", "unaligned", "buffered", "submit refused", "collect refused"])
def test_what_the_kernel_does_not_take_is_read_the_plain_way(tmp_path, monkeypatch, trouble):
    data, backend = build(tmp_path, direct=trouble != "buffered")
    file, views = backend.open("f"), views_of(100)
    if trouble == "no context":
        monkeypatch.setattr(batch_module, "_context", lambda: None)
    elif trouble == "unaligned":
        views = [view[:100] if index % 3 else view for index, view in enumerate(views)]
    elif trouble == "submit refused":
        honest, calls = batch_module._Context.submit, []
        monkeypatch.setattr(batch_module._Context, "submit", lambda self, num, at: (
            calls.append(1) or (honest(self, min(num, 5), at) if len(calls) < 3 else -1)))  # fmt: skip
    elif trouble == "collect refused":
        monkeypatch.setattr(batch_module._Context, "collect", lambda self, least, at: -1)
    offsets = [index % 60 * PAGE for index in range(100)]
    read_batch([file] * 100, views, offsets)
    assert all(view == data[o : o + len(view)] for view, o in zip(views, offsets, strict=True))
    file.close()


def test_a_batch_that_runs_past_the_end_names_the_request(tmp_path):
    data, backend = build(tmp_path, num_pages=4)
    file, views = backend.open("f"), views_of(3, 2 * PAGE)
    with pytest.raises(OffloadIOError, match="shorter than the store made it") as caught:
        read_batch([file] * 3, views, [0, 3 * PAGE, PAGE])
    assert (caught.value.offset, caught.value.nbytes) == (4 * PAGE, PAGE)
    assert views[0] == data[: 2 * PAGE]
    file.close()


def test_faults_are_met_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr("offload.scheduler.storage.transfer.RETRY_PAUSE_S", 0.0)
    data, backend = build(tmp_path)
    faulty = FaultyBackend(backend, [Fault(operation="read", number=errno.EIO, times=2, skip=5)])
    file, views = faulty.open("f"), views_of(20)
    assert read_batch([file] * 20, views, [PAGE] * 20) == 2
    assert all(view == data[PAGE : 2 * PAGE] for view in views)
    file.close()


def test_threads_and_forked_children_use_their_own_queues(tmp_path):
    data, backend = build(tmp_path)
    file = backend.open("f")
    wrong = []

    def work(seed):
        chance, views = random.Random(seed), views_of(300)
        offsets = [chance.randrange(64) * PAGE for _ in views]
        read_batch([file] * 300, views, offsets)
        if not all(view == data[o : o + PAGE] for view, o in zip(views, offsets, strict=True)):
            wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    work(6)
    child = os.fork()
    if child == 0:
        work(7)
        os._exit(len(wrong))
    assert os.waitpid(child, 0)[1] == 0
    assert wrong == []
    file.close()
