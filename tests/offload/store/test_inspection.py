"""`offload store inspect | verify | gc` and `offload probe`: what they say is true, they touch only what they say."""

import json
import shutil

import pytest

from offload.bench.cli import main
from offload.bench.cli.main import one_line
from offload.scheduler.storage import PosixBackend, ProbeReport
from offload.scheduler.storage.probe import best, measure_drive
from offload.store import NotResumable, Store, StoreBusy, StoreError, StoreExists, StoreMissing
from offload.store.inspection import delete_garbage, inspect_store, list_garbage, verify_store
from offload.store.tuning import load_tuning, shares_of


@pytest.fixture
def committed(make, kit, tmp_path):
    """A store on two directories with one committed step; closed."""
    members = kit.extents(2, (kit.PAGE, (4 << 20) + kit.PAGE))
    store = make(members, [tmp_path / "a", tmp_path / "b"], durability="step")
    for step in (1, 2, 3):
        kit.run(kit.write_step(store, members, step))
    store.close()
    kit.members, kit.places = members, [tmp_path / "a", tmp_path / "b"]
    return kit


def names(directory):
    return sorted(path.name for path in (directory / "offload-store").iterdir())


def test_inspect_tells_what_lives_where(committed):
    found = inspect_store([committed.places[0]])
    assert found.directories == tuple(committed.places)
    assert (found.step, found.durability, found.resumable, found.why_not) == (3, "step", True, "")
    assert found.identity == committed.IDENTITY
    rows = {row.key: row for row in found.rows}
    assert len(rows) == 6
    row = rows["blocks.1/states"]
    assert (row.nbytes, row.num_pieces, row.slot, row.directories) == ((4 << 20) + 2 * committed.PAGE, 2, 0, (0, 1))
    assert rows["blocks.1/grad"].slot is None
    on_disk = sum(f.stat().st_size for place in committed.places for f in (place / "offload-store").glob("unit-*"))
    assert found.file_nbytes == on_disk
    assert found.endurance["written_nbytes"] == 12 * ((4 << 20) + 2 * committed.PAGE)
    assert inspect_store([committed.places[1]]).rows == found.rows
    assert inspect_store([committed.places[0] / "offload-store"]).rows == found.rows


def test_inspect_works_beside_a_running_engine_and_verify_does_not(committed, lanes):
    with Store.reopen(committed.places, committed.members, committed.IDENTITY, lanes):
        assert inspect_store([committed.places[0]]).step == 3
        for check in (verify_store, lambda places: list_garbage(places[0])):
            with pytest.raises(StoreBusy, match="pid"):
                check(committed.places)


def test_verify_finds_every_damaged_piece_and_counts_its_bytes(committed, capsys):
    calls = []
    assert verify_store(committed.places, progress=lambda *numbers: calls.append(numbers)) == []
    total = 4 * ((4 << 20) + 2 * committed.PAGE)
    assert calls[-1] == (total, total)
    assert main(["store", "verify", str(committed.places[0])]) == 0
    assert "step 3 is whole" in capsys.readouterr().out
    path = committed.places[1] / "offload-store" / "unit-blocks.1.slot0"
    with open(path, "r+b") as file:
        file.write(b"\xff" * 10)
    [line] = verify_store([committed.places[0]])
    assert "piece 1 of 2 of blocks.1/param (parameters blocks.1.weight" in line
    path.unlink()
    lines = verify_store([committed.places[0]])
    assert len(lines) == 3  # the missing file, and the two large pieces that lie partly in it
    assert main(["store", "verify", str(committed.places[0])]) == 1
    assert "damaged in 3 places" in capsys.readouterr().out


def test_the_directories_of_one_store_may_be_given_in_any_order_and_number(committed):
    first, second = committed.places
    assert inspect_store([second, first]).directories == (first, second)
    assert verify_store([second, first]) == []
    with pytest.raises(StoreError, match="no directory"):
        inspect_store([])


def test_several_runs_are_verified_each_for_itself(committed, make, kit, capsys, tmp_path):
    other = make(kit.extents(1), [tmp_path / "c"], durability="step")
    kit.run(kit.write_step(other, kit.extents(1), 9))
    other.close()
    first, second, third = map(str, (*committed.places, tmp_path / "c"))
    for check in (verify_store, inspect_store):
        with pytest.raises(StoreError, match="not the parts of one store; name the directories of one run at a time"):
            check([first, third])
    assert main(["store", "verify", first, third, second]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{first}: step 3 is whole", f"{third}: step 9 is whole"]
    with open(tmp_path / "c" / "offload-store" / "unit-blocks.0.slot0", "r+b") as file:
        file.write(b"\xff" * 10)
    assert main(["store", "verify", first, third]) == 1
    assert f"{third}: step 9 is damaged in 1 places" in capsys.readouterr().out
    assert main(["store", "verify", first, str(tmp_path / "nothing")]) == 2


def test_two_copies_of_one_part_are_not_a_store(committed, tmp_path):
    shutil.copytree(committed.places[0], tmp_path / "copy")
    with pytest.raises(StoreError, match="not the parts of one store"):
        verify_store([committed.places[0], tmp_path / "copy"])


def test_verify_of_what_never_committed_says_so(make, kit, tmp_path):
    make(kit.extents(1), durability="step").close()
    with pytest.raises(NotResumable, match="nothing to verify"):
        verify_store([tmp_path / "nvme"])
    with pytest.raises(StoreMissing, match="holds no store"):
        verify_store([tmp_path])


def test_gc_keeps_a_store_that_can_be_resumed_and_takes_its_litter(committed):
    root = committed.places[0] / "offload-store"
    whole = names(committed.places[0])
    for name in ("manifest.json.tmp", "unit-gone.slot0", ".probe-1"):
        (root / name).write_bytes(b"x" * 5000)
    garbage = list_garbage(committed.places[0])
    assert garbage.names == (".probe-1", "manifest.json.tmp", "unit-gone.slot0")
    assert garbage.nbytes == 3 * 8192
    assert len(names(committed.places[0])) == len(whole) + 3  # listing deletes nothing
    delete_garbage(garbage)
    assert names(committed.places[0]) == whole
    assert verify_store(committed.places) == []
    assert list_garbage(committed.places[0]).names == ()


def test_gc_takes_a_resumable_store_only_when_told_twice(committed, capsys):
    place = str(committed.places[0])
    before = names(committed.places[0])
    assert main(["store", "gc", place, "--delete"]) == 0
    assert main(["store", "gc", place, "--resumable-too"]) == 0
    assert names(committed.places[0]) == before
    assert "nothing was deleted, add --delete" in capsys.readouterr().out
    assert main(["store", "gc", place, str(committed.places[1]), "--resumable-too", "--delete"]) == 0
    assert names(committed.places[0]) == names(committed.places[1]) == []


def test_gc_takes_a_dead_store_and_leaves_what_is_not_ours(make, kit, tmp_path):
    store = make(kit.extents(1))
    store._mover.close_files()
    store._folders.release()
    store._closed = True  # as if the process had died
    root = tmp_path / "nvme" / "offload-store"
    (root / "notes.txt").write_text("mine")
    garbage = list_garbage(tmp_path / "nvme")
    assert garbage.why == "a store that can never be resumed"
    assert set(garbage.names) == {"lock", "store.json", "unit-blocks.0.scratch", "unit-blocks.0.slot0"}
    delete_garbage(garbage)
    assert names(tmp_path / "nvme") == ["notes.txt"]


def test_gc_makes_no_lock_of_its_own_and_takes_a_lone_one(tmp_path):
    root = tmp_path / "nvme" / "offload-store"
    root.mkdir(parents=True)
    assert list_garbage(tmp_path / "nvme").names == ()
    (root / "drive.json").write_text("{")
    (root / "lock").write_text("1\n")
    garbage = list_garbage(tmp_path / "nvme")
    assert (garbage.names, garbage.why) == (("lock",), "what a store left that is gone")
    assert names(tmp_path / "nvme") == ["drive.json", "lock"]
    delete_garbage(garbage)
    assert names(tmp_path / "nvme") == ["drive.json"]
    assert list_garbage(tmp_path / "nvme").names == ()


def test_gc_deletes_nothing_if_the_folder_changed_since_the_listing(make, kit, tmp_path):
    make(kit.extents(1)).close()
    garbage = list_garbage(tmp_path / "nvme")
    make(kit.extents(1)).close()
    (tmp_path / "nvme" / "offload-store" / "store.json").unlink()
    with pytest.raises(StoreError, match="list it again"):
        delete_garbage(garbage)


def test_the_command_line_prints_tables_and_one_line_errors(committed, capsys, tmp_path):
    target = tmp_path / "out.json"
    assert main(["store", "inspect", str(committed.places[0]), "--json", str(target)]) == 0
    out = capsys.readouterr().out
    for word in ("step 3, durability step", "can be resumed", "blocks.1/states", "0 1"):
        assert word in out
    assert json.loads(target.read_text())["step"] == 3
    assert main(["store", "inspect", str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_command_line_names_its_own_flags(committed, make, kit, tmp_path):
    with pytest.raises(StoreExists) as refused:
        make(kit.extents(1), committed.places, durability="step")
    assert "resume=True" in str(refused.value) and "overwrite=True" in str(refused.value)
    shown = one_line(refused.value)
    assert "Continue it with --resume, discard it with --overwrite, or name another" in shown and "=True" not in shown
    assert one_line(ValueError("go on with OffloadConfig(resume=True)")) == "go on with --resume"
    assert one_line(ValueError('written with durability="none":')) == "written with --durability none:"


def report(**facts):
    plain = {"path": "p", "file_system": "ext4", "direct": True, "align_nbytes": 512, "free_nbytes": 1,
             "read_gb_s": 3.0, "write_gb_s": 1.5, "mixed_gb_s": 2.0, "read_latency_s": 1e-4, "flush_s": 1e-3,
             "chunk_nbytes": 1 << 20, "depth": 4}  # fmt: skip
    return ProbeReport(**{**plain, **facts})


def test_probe_measures_and_keeps_the_result_for_the_next_store(make, kit, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(measure_drive, "__kwdefaults__", {**measure_drive.__kwdefaults__, "file_nbytes": 16 << 20})
    target = tmp_path / "drives.json"
    assert main(["probe", str(tmp_path / "nvme"), "--seconds", "0.2", "--json", str(target)]) == 0
    [drive] = json.loads(target.read_text())["drives"]
    assert "GB/s" in capsys.readouterr().out
    assert min(drive[name] for name in ("read_gb_s", "write_gb_s", "mixed_gb_s", "read_latency_s")) > 0
    assert drive["free_nbytes"] > 1 << 20
    backend = PosixBackend(tmp_path / "nvme" / "offload-store", direct=False)
    tuning = load_tuning(backend)
    assert (tuning.chunk_nbytes, tuning.depth) == (drive["chunk_nbytes"], drive["depth"])
    assert names(tmp_path / "nvme") == ["drive.json", "lock"]
    store = make(kit.extents(1))
    assert (store._mover.queues[0].depth // 2, store._mover._tunings) == (tuning.depth, [tuning])
    store.close()
    make(kit.extents(1)).close()
    assert "drive.json" in names(tmp_path / "nvme")


def test_a_damaged_measurement_is_ignored_with_a_warning(make, kit, tmp_path, caplog):
    root = tmp_path / "nvme" / "offload-store"
    root.mkdir(parents=True)
    (root / "drive.json").write_text("{")
    make(kit.extents(1))
    assert "drive.json is ignored" in caplog.text


def test_the_smallest_request_within_a_tenth_of_the_best_wins():
    rates = {(1, 2): (1.0, 1.0), (1, 4): (1.96, 1.96), (4, 2): (1.97, 1.97), (4, 4): (2.0, 2.0), (8, 8): (3.0, 0.5)}
    assert best(rates) == (1, 4)
    assert best({**rates, (1, 4): (1.75, 1.75)}) == (4, 2)


def test_shares_follow_the_combined_bandwidth():
    fast, slow = report(), report(read_gb_s=1.0, write_gb_s=0.5)
    assert shares_of([fast.tuning, slow.tuning]) == (48, 16)
    assert shares_of([fast.tuning, report(read_gb_s=None).tuning]) == (1, 1)


def test_bytes_are_striped_in_proportion_to_bandwidth(make, kit, tmp_path):
    fast, slow = report(), report(read_gb_s=1.0, write_gb_s=0.5)
    members = kit.extents(3, (8 << 20, (3 << 20) + 4096, 8192, 64 << 10), scratch=False)
    store = make(members, [tmp_path / "fast", tmp_path / "slow"], tunings=[fast.tuning, slow.tuning])
    kit.run(kit.write_step(store, members, 1))
    kit.run(kit.check_step(store, members, 1))
    sizes = [
        sum(path.stat().st_size for path in (tmp_path / name / "offload-store").glob("unit-*"))
        for name in ("fast", "slow")
    ]
    assert sizes[0] / sum(sizes) == pytest.approx(0.75, abs=0.02)
    # Both drives work on one large piece.
    [runs] = [pieces[0] for key, pieces in store._mover._layout.segments.items() if key == "blocks.0/param"]
    assert [(run.directory, run.nbytes >> 20) for run in runs] == [(0, 6), (1, 2)]
