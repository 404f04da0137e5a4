"""Every damage is found and named: torn documents, missing and short files, flipped bits, in any place."""

import asyncio
import json
import random

import pytest

from offload.store import ChecksumError, NotResumable, Store, StoreCorrupt, StoreMissing


@pytest.fixture
def dead(make, kit, lanes, tmp_path):
    """A closed store of two committed steps; `dead.reopen()` opens it."""
    members = kit.extents(2, (3 * kit.PAGE, (2 << 20) + kit.PAGE), scratch=True)
    store = make(members, durability="step")
    for step in (1, 2):
        kit.run(kit.write_step(store, members, step))
    store.close()
    kit.members = members
    kit.root = tmp_path / "nvme" / "offload-store"
    kit.reopen = lambda **options: Store.reopen([tmp_path / "nvme"], members, kit.IDENTITY, lanes, **options)
    return kit


@pytest.mark.parametrize("name", ["manifest.json", "store.json"])
def test_a_torn_document_is_detected_at_every_length(dead, name):
    whole = (dead.root / name).read_bytes()
    for length in [0, 1, 10, len(whole) // 2, len(whole) - 3]:
        (dead.root / name).write_bytes(whole[:length])
        with pytest.raises(StoreCorrupt, match=rf"{name} is torn or not a store's document \({length} bytes"):
            dead.reopen()
    (dead.root / name).write_bytes(whole)
    dead.reopen().close()


@pytest.mark.parametrize("name", ["manifest.json", "store.json"])
def test_any_flipped_bit_in_a_document_is_detected(dead, name):
    whole = (dead.root / name).read_bytes()
    chance = random.Random(3)
    num_silent = 0
    for _ in range(150):
        place, bit = chance.randrange(len(whole) - 1), chance.randrange(8)
        data = bytearray(whole)
        data[place] ^= 1 << bit
        (dead.root / name).write_bytes(data)
        try:
            dead.reopen().close()
            num_silent += json.loads(data) != json.loads(whole)
        except StoreCorrupt:
            pass
    assert num_silent == 0


def test_a_document_of_a_newer_version_is_refused(dead):
    from xxhash import xxh3_64_hexdigest

    outer = json.loads((dead.root / "store.json").read_bytes())
    outer["body"]["version"] = 99
    text = json.dumps(outer["body"], sort_keys=True, separators=(",", ":"))
    outer["checksum"] = xxh3_64_hexdigest(text.encode())
    (dead.root / "store.json").write_text(json.dumps(outer))
    with pytest.raises(StoreCorrupt, match="version 99, this program reads"):
        dead.reopen()


def test_missing_documents_are_named(dead):
    (dead.root / "manifest.json").unlink()
    with pytest.raises(NotResumable, match="before its first commit"):
        dead.reopen()
    (dead.root / "store.json").unlink()
    with pytest.raises(StoreMissing, match="holds no store"):
        dead.reopen()


def test_a_manifest_of_another_store_is_refused(dead, make, tmp_path):
    other = make(dead.members, [tmp_path / "other"], durability="step")
    dead.run(dead.write_step(other, dead.members, 9))
    other.close()
    (dead.root / "manifest.json").write_bytes((tmp_path / "other" / "offload-store" / "manifest.json").read_bytes())
    with pytest.raises(StoreCorrupt, match=r"manifest\.json belongs to store"):
        dead.reopen()


@pytest.mark.parametrize("slot", [0, 1])
def test_missing_short_and_long_files_are_named(dead, slot):
    path = dead.root / f"unit-blocks.1.slot{slot}"
    whole = path.read_bytes()
    path.unlink()
    with pytest.raises(StoreCorrupt, match=rf"{path.name}: is missing"):
        dead.reopen()
    for data in (b"", whole[:-4096], whole + b"x"):
        path.write_bytes(data)
        with pytest.raises(StoreCorrupt, match=rf"{path.name}: has {len(data)} bytes instead of {len(whole)}"):
            dead.reopen()
    path.write_bytes(whole)
    dead.reopen().close()


def flip(path, offset, bit=0):
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))


def committed_slot(root, key):
    return json.loads((root / "manifest.json").read_bytes())["body"]["extents"][key]["slot"]


def test_any_flipped_bit_in_a_committed_piece_is_found_and_named(dead):
    slot = committed_slot(dead.root, "blocks.1/states")
    path = dead.root / f"unit-blocks.1.slot{slot}"
    start = (3 + 1) * dead.PAGE + (2 << 20)  # behind the parameters
    sizes = dead.members[0].piece_nbytes
    chance = random.Random(5)
    for piece, first in ((0, start), (1, start + sizes[0])):
        for place in (0, sizes[piece] - 1, chance.randrange(sizes[piece])):
            flip(path, first + place, chance.randrange(8))
            before = path.read_bytes()
            with dead.reopen() as store:
                with pytest.raises(ChecksumError) as caught:
                    dead.run(store.read("blocks.1/states", piece, dead.allocate(sizes[piece])))
                error = caught.value
                assert (error.key, error.piece, error.path, error.offset) == (
                    "blocks.1/states", piece, str(path), first)  # fmt: skip
                assert error.expected != error.found
                for word in (error.expected, error.found, "blocks.1.weight", str(path), f"piece {piece} of 2"):
                    assert word in str(error)
                dead.run(dead.check_step(store, dead.members[:3], 2))  # the other unit is whole
            assert path.read_bytes() == before
            _restore(dead, path, first, piece)


def _restore(dead, path, first, piece):
    wanted = bytes(dead.pages(dead.members[0].piece_nbytes[piece], _seed(dead, piece)).numpy())
    with open(path, "r+b") as file:
        file.seek(first)
        file.write(wanted)


def _seed(dead, piece):
    return hash((2, piece)) ^ sum(b"blocks.1/states")


def test_without_verify_damage_is_not_looked_for(dead):
    """The price of verify=False, stated: the same flipped bit comes back as data."""
    slot = committed_slot(dead.root, "blocks.0/param")
    flip(dead.root / f"unit-blocks.0.slot{slot}", 5)
    with dead.reopen(verify=False) as store:
        got = dead.allocate(3 * dead.PAGE)
        dead.run(store.read("blocks.0/param", 0, got))
        wanted = dead.pages(3 * dead.PAGE, hash((2, 0)) ^ sum(b"blocks.0/param"))
        assert (got != wanted).sum() == 1
    with dead.reopen() as store, pytest.raises(ChecksumError):
        dead.run(store.read("blocks.0/param", 0, got))


def test_damage_in_the_slot_that_is_not_committed_does_not_matter(dead):
    slot = 1 - committed_slot(dead.root, "blocks.0/param")
    path = dead.root / f"unit-blocks.0.slot{slot}"
    path.write_bytes(bytes(path.stat().st_size))
    with dead.reopen() as store:
        dead.run(dead.check_step(store, dead.members, 2))


def test_damage_within_a_run_is_found_with_and_without_durability(make, kit, tmp_path):
    for durability in ("none", "step"):
        store = make(kit.extents(1, (kit.PAGE,)), [tmp_path / durability], durability=durability)
        for key, name in (("blocks.0/param", "slot0"), ("blocks.0/grad", "scratch")):
            kit.run(store.write(key, 0, kit.pages(kit.PAGE, 1)))
            flip(tmp_path / durability / "offload-store" / f"unit-blocks.0.{name}", 77)
            with pytest.raises(ChecksumError, match="is damaged"):
                kit.run(store.read(key, 0, kit.allocate(kit.PAGE)))


def test_two_pieces_that_changed_places_are_found(dead):
    """Whole and undamaged blocks in the wrong place, as a drive with a broken map returns them."""
    slot = committed_slot(dead.root, "blocks.0/param")
    path = dead.root / f"unit-blocks.0.slot{slot}"
    data = bytearray(path.read_bytes())
    a, b = slice(3 * dead.PAGE, 3 * dead.PAGE + (1 << 20)), slice(3 * dead.PAGE + (1 << 20), 3 * dead.PAGE + (2 << 20))
    data[a], data[b] = data[b], data[a]
    path.write_bytes(data)
    with dead.reopen() as store, pytest.raises(ChecksumError):
        dead.run(store.read("blocks.0/param", 1, dead.allocate((2 << 20) + dead.PAGE)))


def test_reads_of_damaged_pieces_do_not_disturb_others(dead):
    slot = committed_slot(dead.root, "blocks.0/param")
    flip(dead.root / f"unit-blocks.0.slot{slot}", 0)

    async def body(store):
        sizes = dead.members[0].piece_nbytes
        calls = [store.read(m.key, p, dead.allocate(sizes[p])) for m in dead.members if not m.scratch for p in (0, 1)]
        return await asyncio.gather(*calls, return_exceptions=True)

    with dead.reopen() as store:
        results = dead.run(body(store))
        assert [type(result) for result in results] == [ChecksumError] + [type(None)] * 7
        assert store.statistics().in_flight_nbytes == 0
