"""What is written is what is read, through the final files on a real file system."""

import asyncio
import logging
import stat

import pytest
import torch

from offload.scheduler.trace import moved_nbytes
from offload.store import ChecksumError, Extent, Store, StoreClosed, StoreError


@pytest.mark.parametrize("num_directories", [1, 2, 3])
@pytest.mark.parametrize("durability", ["none", "step", 3])
def test_every_piece_comes_back_bit_for_bit(make, kit, tmp_path, num_directories, durability):
    pieces = (5 * kit.PAGE, kit.PAGE, (7 << 20) + 3 * kit.PAGE)
    members = kit.extents(2, pieces)
    directories = [tmp_path / f"d{index}" for index in range(num_directories)]
    store = make(members, directories, durability=durability)
    wanted = {
        (extent.key, piece): kit.pages(nbytes, index * 10 + piece)
        for index, extent in enumerate(members)
        for piece, nbytes in enumerate(extent.piece_nbytes)
    }

    async def body():
        await asyncio.gather(*(store.write(key, piece, buffer) for (key, piece), buffer in wanted.items()))
        for (key, piece), buffer in wanted.items():
            got = kit.allocate(buffer.numel())
            await store.read(key, piece, got)
            assert torch.equal(got, buffer), (key, piece)

    kit.run(body())
    total = len(members) * sum(pieces)
    assert store.written_nbytes == store.read_nbytes == total == store.statistics().read_nbytes
    sizes = [sum(path.stat().st_size for path in (d / "offload-store").glob("unit-*")) for d in directories]
    slots = 1 if durability == "none" else 2
    assert sum(sizes) == (4 * slots + 2) * sum(pieces)
    assert all(sizes)


def test_lanes_record_every_byte(make, kit, lanes):
    store = make(kit.extents(1, (kit.PAGE, (17 << 20))))

    async def body():
        buffer = kit.pages(17 << 20, 1)
        await store.write("blocks.0/param", 1, buffer)
        await store.read("blocks.0/param", 1, buffer)

    kit.run(body())
    spans, _ = lanes.trace.drain()
    assert moved_nbytes(spans)["read"] == moved_nbytes(spans)["write"] == 17 << 20
    assert {(span.unit, span.kind) for span in spans} == {("blocks.0", "param")}
    assert len([span for span in spans if span.lane == "read"]) == 5  # 4 times 4 and 1 MiB


def test_one_file_per_unit_and_slot_holds_params_then_states(make, kit, tmp_path):
    members = [
        Extent(key="u/states", unit="u", kind="states", piece_nbytes=(kit.PAGE, kit.PAGE)),
        Extent(key="u/param", unit="u", kind="param", piece_nbytes=(2 * kit.PAGE,)),
        Extent(key="u/grad", unit="u", kind="grad", piece_nbytes=(kit.PAGE,), scratch=True),
    ]
    store = make(members, durability="step")

    async def body():
        for extent in members:
            for piece, nbytes in enumerate(extent.piece_nbytes):
                await store.write(extent.key, piece, kit.pages(nbytes, len(extent.kind) + piece))

    kit.run(body())
    root = tmp_path / "nvme" / "offload-store"
    assert sorted(path.name for path in root.glob("unit-*")) == ["unit-u.scratch", "unit-u.slot0", "unit-u.slot1"]
    wanted = torch.cat([kit.pages(2 * kit.PAGE, 5), kit.pages(kit.PAGE, 6), kit.pages(kit.PAGE, 7)])
    assert (root / "unit-u.slot0").read_bytes() == bytes(wanted.numpy())
    assert (root / "unit-u.slot1").read_bytes() == bytes(4 * kit.PAGE)
    assert (root / "unit-u.scratch").read_bytes() == bytes(kit.pages(kit.PAGE, 4).numpy())


@pytest.mark.parametrize("unit", ["a/../b", "..", "x" * 400, "weiß 1", "a%2Fb", "con\n"])
def test_any_unit_name_is_a_safe_file_name(make, kit, tmp_path, unit):
    store = make([Extent(key="k", unit=unit, kind="param", piece_nbytes=(kit.PAGE,))])
    buffer = kit.pages(kit.PAGE, 3)
    kit.run(store.write("k", 0, buffer))
    [path] = (tmp_path / "nvme" / "offload-store").glob("unit-*")
    assert path.read_bytes() == bytes(buffer.numpy())
    assert len(path.name) < 230


def test_files_are_private(make, kit, tmp_path):
    directory = tmp_path / "new" / "nvme"
    store = make(kit.extents(1), [directory], durability="step")
    kit.run(kit.write_step(store, kit.extents(1), 1))
    for path in [directory.parent, directory, *directory.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    assert {path.name for path in directory.rglob("*") if path.is_file()} >= {"lock", "store.json", "manifest.json"}


def test_space_is_allocated_before_the_first_write(make, kit, tmp_path):
    make(kit.extents(1, (1 << 20,)), durability="step")
    for path in (tmp_path / "nvme" / "offload-store").glob("unit-*"):
        assert path.stat().st_blocks * 512 >= path.stat().st_size > 0, path


def test_reading_what_was_never_written_is_an_error(make, kit):
    store = make(kit.extents(1))
    with pytest.raises(StoreError, match=r"piece 1 of 2 of blocks\.0/param .*blocks\.0\.weight.*never written"):
        kit.run(store.read("blocks.0/param", 1, kit.allocate(kit.PAGE)))


@pytest.mark.parametrize(
    ("key", "piece", "nbytes"),
    [("nope", 0, 4096), ("blocks.0/param", 5, 4096), ("blocks.0/param", -1, 4096), ("blocks.0/param", 0, 4096)],
)
def test_wrong_requests_name_what_was_expected(make, kit, key, piece, nbytes):
    store = make(kit.extents(1))
    with pytest.raises(StoreError, match=r"no extent 'nope'|expected (0\.\.1|8192 bytes)"):
        kit.run(store.write(key, piece, kit.allocate(nbytes)))


@pytest.mark.parametrize("sizes", [(), (0,), (4096, 4095), (-4096,)])
def test_pieces_are_whole_pages(sizes):
    with pytest.raises(StoreError, match="positive multiple of 4096"):
        Extent(key="k", unit="u", kind="param", piece_nbytes=sizes)


def test_doubled_keys_and_empty_stores_are_refused_without_a_trace(make, kit, tmp_path):
    with pytest.raises(StoreError, match="given twice"):
        make(kit.extents(1) + kit.extents(1))
    with pytest.raises(StoreError, match="at least one extent"):
        make([])
    assert list(tmp_path.iterdir()) == []


def test_close_twice_and_use_after_close(make, kit, tmp_path):
    store = make(kit.extents(1))
    buffer = kit.pages(2 * kit.PAGE, 1)
    kit.run(store.write("blocks.0/param", 0, buffer))
    store.close()
    store.close()
    for call in (
        store.read("blocks.0/param", 0, buffer),
        store.write("blocks.0/param", 0, buffer),
        store.commit(1, {}),
    ):
        with pytest.raises(StoreClosed, match="open it again"):
            kit.run(call)
    assert store.statistics().written_nbytes == 2 * kit.PAGE


def test_close_without_durability_leaves_no_data_behind(make, kit, tmp_path):
    make(kit.extents(2)).close()
    assert sorted(path.name for path in (tmp_path / "nvme" / "offload-store").iterdir()) == ["lock", "store.json"]


def test_direct_io_is_used_or_its_absence_logged_once(make, kit, caplog, tmp_path):
    with caplog.at_level(logging.WARNING):
        store = make(kit.extents(1), [tmp_path / "a"])
    warnings = [record for record in caplog.records if "direct I/O does not work" in record.message]
    assert len(warnings) == (0 if store.direct else 1)


def test_a_store_of_many_files_raises_the_descriptor_limit(kit, lanes, tmp_path):
    import resource

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    try:
        members = [Extent(key=f"{i}", unit=f"{i}", kind="param", piece_nbytes=(kit.PAGE,)) for i in range(300)]
        with Store.create([tmp_path], members, kit.IDENTITY, lanes, durability="none") as store:
            kit.run(store.write("299", 0, kit.pages(kit.PAGE, 1)))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_descriptors_and_threads_are_flat_over_many_stores(kit, lanes, tmp_path):
    import os
    import threading

    def once():
        members = kit.extents(2)
        with Store.create([tmp_path], members, kit.IDENTITY, lanes, durability="step", overwrite=True) as store:
            kit.run(kit.write_step(store, members, 1))
        with Store.reopen([tmp_path], members, kit.IDENTITY, lanes) as store:
            kit.run(kit.check_step(store, members, 1))

    num_threads = threading.active_count() + lanes.read.num_threads + lanes.write.num_threads
    once()
    num_descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        once()
    assert len(os.listdir("/proc/self/fd")) == num_descriptors
    assert threading.active_count() <= num_threads


@pytest.mark.parametrize("num_directories", [1, 3])
def test_reading_many_pieces_at_once_is_reading_each(make, kit, tmp_path, num_directories):
    members = kit.extents(3, (kit.PAGE,) * 40 + (3 << 20, 64 << 10), scratch=False)
    store = make(members, [tmp_path / f"d{index}" for index in range(num_directories)], durability="step")
    kit.run(kit.write_step(store, members, 1))
    wanted = [
        (extent.key, piece, kit.allocate(nbytes))
        for extent in members
        for piece, nbytes in enumerate(extent.piece_nbytes)
    ]
    kit.run(store.read_many(wanted))
    assert store.read_nbytes == sum(extent.nbytes for extent in members)
    for key, piece, buffer in wanted:
        got = kit.allocate(buffer.numel())
        kit.run(store.read(key, piece, got))
        assert torch.equal(got, buffer), (key, piece)
    [place] = store._mover._layout.segments["blocks.1/param"][7]
    path = tmp_path / f"d{place.directory}" / "offload-store" / "unit-blocks.1.slot0"
    with open(path, "r+b") as file:
        file.seek(place.offset)
        file.write(b"\xff\x00\xff\x00\xff")
    with pytest.raises(ChecksumError, match=r"piece 7 of 42 of blocks\.1/param"):
        kit.run(store.read_many(wanted))
