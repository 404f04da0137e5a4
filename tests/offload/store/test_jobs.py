"""Pieces travel as few jobs of several requests; how they are cut changes neither bytes nor checksums."""

import threading

import pytest
import torch

from offload.scheduler.storage import DriveTuning, MemoryBackend
from offload.scheduler.storage.wrapped import WrappedBackend, WrappedFile
from offload.store import Store
from offload.store.checksum import block_digests, piece_checksum, spent_s

MIB = 1 << 20
NBYTES = 5 * MIB + 4096


class Listening(WrappedBackend):
    """Notes (offset, bytes) of every request."""

    def __init__(self, root):
        super().__init__(MemoryBackend(root))
        self.volatile = False
        self.requests, self.lock = {"read": [], "write": []}, threading.Lock()

    def open(self, name, *, create=False):
        backend = self

        class File(WrappedFile):
            def read_into(self, buffer, offset):
                with backend.lock:
                    backend.requests["read"].append((offset, len(buffer)))
                return super().read_into(buffer, offset)

            def write_from(self, buffer, offset):
                with backend.lock:
                    backend.requests["write"].append((offset, len(buffer)))
                return super().write_from(buffer, offset)

        return File(self.inner.open(name, create=create))


@pytest.mark.parametrize(
    ("chunk", "depth", "nbytes", "job"),
    [(1, 4, 1, 1), (1, 4, 4 * MIB, 1), (1, 4, 4 * MIB + 1, 2), (1, 4, 64 * MIB, 8), (4, 4, 4 * MIB, 4),
     (4, 2, 16 * MIB, 8), (4, 1, 64 * MIB, 8), (3, 1, 64 * MIB, 6), (16, 4, 64 * MIB, 16)],
)  # fmt: skip
def test_a_transfer_is_one_job_per_thread_within_eight_mebibytes(chunk, depth, nbytes, job):
    assert DriveTuning(chunk_nbytes=chunk * MIB, depth=depth).job_nbytes(nbytes) == job * MIB


@pytest.mark.parametrize("lane", ["read", "write"])
def test_a_job_moves_request_by_request(make, kit, lanes, tmp_path, lane):
    members = kit.extents(1, (NBYTES,), scratch=False)
    made = []
    store = make(members, backend=lambda root: made.append(Listening(root)) or made[-1],
                 tunings=[DriveTuning(chunk_nbytes=MIB, depth=2)])  # fmt: skip
    kit.run(kit.write_step(store, members, 1))
    [backend] = made
    backend.requests[lane].clear()
    lanes.trace.drain()
    buffer = kit.pages(NBYTES, 3)
    kit.run(getattr(store, lane)("blocks.0/param", 0, buffer))
    assert sorted(backend.requests[lane]) == [*((i * MIB, MIB) for i in range(5)), (5 * MIB, 4096)]
    spans, _ = lanes.trace.drain()
    assert sorted((span.lane, span.nbytes) for span in spans) == [(lane, 2 * MIB + 4096), (lane, 3 * MIB)]


def test_the_cut_changes_no_checksum(make, kit, lanes, tmp_path):
    members = kit.extents(2, (NBYTES, 9 * MIB), scratch=False)
    store = make(members, durability="step", tunings=[DriveTuning(chunk_nbytes=MIB, depth=2)])
    kit.run(kit.write_step(store, members, 1))
    store.close()
    for tuning in (DriveTuning(chunk_nbytes=4 * MIB, depth=4), DriveTuning(chunk_nbytes=2 * MIB, depth=1)):
        with Store.reopen([tmp_path / "nvme"], members, kit.IDENTITY, lanes, tunings=[tuning]) as again:
            kit.run(kit.check_step(again, members, 1))


def test_the_time_of_checksums_is_counted():
    before_s = spent_s()
    view = memoryview(torch.zeros(64 * MIB, dtype=torch.uint8).numpy()).cast("B")
    assert piece_checksum([block_digests(view)]) == piece_checksum([block_digests(view[: 32 * MIB])] * 2)
    assert spent_s() > before_s
