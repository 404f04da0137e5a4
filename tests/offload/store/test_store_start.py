"""A store that cannot be made says why, and leaves nothing behind; what is not ours is never touched."""

import errno
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from offload.scheduler.storage import MemoryBackend, NoSpace, OffloadIOError, PosixBackend
from offload.store import Store, StoreBusy, StoreError, StoreExists
from offload.store.folder import InMemory


def test_a_second_engine_is_refused_with_the_pid(make, kit):
    make(kit.extents(1))
    with pytest.raises(StoreBusy, match=rf"pid {os.getpid()}; .*another directory"):
        make(kit.extents(1))


def test_another_process_is_refused_with_the_pid_and_the_lock_dies_with_it(make, kit, tmp_path):
    root = tmp_path / "nvme" / "offload-store"
    root.mkdir(parents=True)
    code = (
        "import sys; from pathlib import Path; from offload.store.lock import DirectoryLock\n"
        "lock = DirectoryLock(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-P", "-c", code, str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout.readline() == "held\n"
        with pytest.raises(StoreBusy, match=f"pid {child.pid};"):
            make(kit.extents(1))
    finally:
        child.kill()
        child.communicate()
        child.wait()
    make(kit.extents(1))


FORKING = """
import os, sys
from pathlib import Path
from offload.store.lock import DirectoryLock
lock = DirectoryLock(Path(sys.argv[1]))
if os.fork() == 0:
    print("forked", flush=True)
    os.read(int(sys.argv[2]), 1)  # until the test closes its end
    os._exit(0)
os.read(int(sys.argv[2]), 1)
"""


def test_a_worker_that_outlives_a_killed_engine_does_not_keep_the_lock(make, kit, tmp_path):
    root = tmp_path / "nvme" / "offload-store"
    root.mkdir(parents=True)
    reader, writer = os.pipe()
    engine = subprocess.Popen(
        [sys.executable, "-P", "-c", FORKING, str(root), str(reader)],
        stdout=subprocess.PIPE,
        text=True,
        pass_fds=[reader],
    )
    try:
        assert engine.stdout.readline() == "forked\n"
        engine.kill()
        engine.wait()
        make(kit.extents(1))  # StoreBusy if the worker still shared the lock
    finally:
        os.close(writer)
        os.close(reader)
        engine.stdout.read()  # ends when the worker has ended
        engine.stdout.close()


def test_closing_gives_the_lock_back_even_beside_a_forked_child(make, kit):
    store = make(kit.extents(1))
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    try:
        store.close()
        make(kit.extents(1))
    finally:
        os.close(writer)
        os.close(reader)
        os.waitpid(child, 0)


@pytest.mark.parametrize("place", ["nvme", "nvme/deeper", "folder"])
def test_a_path_that_is_a_file_is_refused(make, kit, tmp_path, place):
    (tmp_path / "nvme").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "offload-store").write_text("mine")
    before = kit.tree(tmp_path)
    with pytest.raises(StoreError, match=r"is a file|cannot hold a store: Not a directory"):
        make(kit.extents(1), [tmp_path / place])
    assert kit.tree(tmp_path) == before


@pytest.mark.parametrize("place", ["/proc/offload-test", "/sys/offload-test"])
def test_a_directory_that_cannot_be_written_is_refused(make, kit, place):
    with pytest.raises(StoreError, match=r"cannot hold a store: .*may write to"):
        make(kit.extents(1), [Path(place)])


def test_the_same_directory_twice_is_refused(make, kit, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(StoreError, match="given twice"):
        make(kit.extents(1), [tmp_path / "a", tmp_path / "b"])


def test_a_drive_that_is_too_small_is_refused_before_anything_is_written(make, kit, tmp_path):
    exbi = 1 << 58
    with pytest.raises(NoSpace, match=r"cannot reserve \d+ bytes, \d+ bytes are free.*larger drive") as caught:
        make([*kit.extents(1), _huge(exbi)])
    assert caught.value.needed_nbytes > exbi
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def _huge(nbytes):
    from offload.store import Extent

    return Extent(key="huge", unit="huge", kind="param", piece_nbytes=(nbytes,))


def test_drives_that_are_too_small_one_by_one_are_refused(kit, lanes):
    """Together there is room, but not for each drive's share."""
    drives = {}

    def small(root):
        return drives.setdefault(
            root, MemoryBackend(root, capacity_nbytes=(40 << 20) if "a" in root.parts else (17 << 20))
        )

    with pytest.raises(NoSpace) as caught:
        Store.create(["/a", "/b"], kit.extents(1, (8 << 20,)), kit.IDENTITY, lanes, backend=InMemory(small))
    assert caught.value.needed_nbytes == (16 << 20) + (12 << 20)
    assert [drive.names() for drive in drives.values()] == [[], []]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_drive_that_fills_up_while_reserving_leaves_nothing_behind(make, kit, tmp_path, number):
    class Filling(PosixBackend):
        num_files = 0

        def reserve(self, name, nbytes):
            Filling.num_files += 1
            if Filling.num_files == 4:
                raise NoSpace(self.root / name, nbytes, 0) if number == errno.ENOSPC else OffloadIOError(
                    self.root / name, 0, nbytes, number, what="cannot reserve space"
                )  # fmt: skip
            super().reserve(name, nbytes)

    with pytest.raises(OffloadIOError) as caught:
        make(kit.extents(2), backend=lambda root: Filling(root, direct=False), durability="step")
    assert caught.value.errno == number
    assert Filling.num_files == 4
    assert list(tmp_path.iterdir()) == []


def test_a_full_file_system_is_reported_and_cleaned(kit, lanes, tmp_path):
    """A real one: 8 MiB of tmpfs, where this user may mount."""
    mount = tmp_path / "small"
    mount.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(mount)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        before = sorted(os.listdir(mount))
        backend = PosixBackend(mount, direct=False)
        with pytest.raises(NoSpace, match="are free"):
            backend.reserve("unit-u.slot0", 16 << 20)
        with pytest.raises(NoSpace):
            Store.create([mount / "nvme"], kit.extents(1, (3 << 20,)), kit.IDENTITY, lanes, durability="step")
        assert sorted(os.listdir(mount)) == before == []
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_memory_file_systems_are_warned_about(kit, lanes, caplog):
    import tempfile

    if not os.path.isdir("/dev/shm"):
        pytest.skip("no /dev/shm here")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory, caplog.at_level(logging.WARNING):
        Store.create([Path(directory)], kit.extents(1), kit.IDENTITY, lanes).close()
    assert any("tmpfs, which is host memory" in record.message for record in caplog.records)


def test_a_dead_run_without_a_committed_step_is_replaced(make, kit, tmp_path):
    for durability in ("none", "step"):
        store = make(kit.extents(3), durability=durability)
        kit.run(kit.write_step(store, kit.extents(3), 1, commit=False))
        store._mover.close_files()
        store._folders.release()  # as if the process had died: files stay, the lock goes
        store._closed = True
    store = make(kit.extents(1), durability="step")
    names = sorted(path.name for path in (tmp_path / "nvme" / "offload-store").glob("unit-*"))
    assert names == ["unit-blocks.0.scratch", "unit-blocks.0.slot0", "unit-blocks.0.slot1"]


def test_a_store_that_can_be_resumed_is_kept_unless_told(make, kit, tmp_path):
    members = kit.extents(1)
    store = make(members, durability="step")
    kit.run(kit.write_step(store, members, 7))
    store.close()
    before = kit.tree(tmp_path)
    with pytest.raises(StoreExists, match=r"step 7 of a run that can be resumed.*resume=True.*overwrite=True"):
        make(members, durability="step")
    after = kit.tree(tmp_path)
    assert {name: data for name, data in after.items() if not name.endswith("lock")} == {
        name: data for name, data in before.items() if not name.endswith("lock")
    }
    make(members, durability="step", overwrite=True)
    assert not (tmp_path / "nvme" / "offload-store" / "manifest.json").exists()


def test_the_second_directory_of_a_resumable_store_is_kept(make, kit, tmp_path):
    members = kit.extents(1, (4 << 20,))
    store = make(members, [tmp_path / "a", tmp_path / "b"], durability="step")
    kit.run(kit.write_step(store, members, 1))
    store.close()
    with pytest.raises(StoreExists, match="may be resumable"):
        make(members, [tmp_path / "b"], durability="step")
    with pytest.raises(StoreExists, match="may be resumable"):
        make(members, [tmp_path / "c", tmp_path / "b"], durability="step")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_that_are_not_ours_are_never_deleted(make, kit, tmp_path, overwrite):
    root = tmp_path / "nvme" / "offload-store"
    root.mkdir(parents=True)
    (root / "thesis.tex").write_text("mine")
    (tmp_path / "nvme" / "data.bin").write_text("mine too")
    with pytest.raises(StoreExists, match=r"not a store's \(thesis\.tex\)"):
        make(kit.extents(1), overwrite=overwrite)
    assert (root / "thesis.tex").read_text() == "mine"
    assert (tmp_path / "nvme" / "data.bin").read_text() == "mine too"


@pytest.mark.parametrize("durability", ["every", 0, -1, 1.5, None, True])
def test_durability_is_checked(make, kit, tmp_path, durability):
    with pytest.raises(StoreError, match='"step", "none" or a number'):
        make(kit.extents(1), durability=durability)
    assert list(tmp_path.iterdir()) == []
