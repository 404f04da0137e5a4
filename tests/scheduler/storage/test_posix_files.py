"""Real files: direct where aligned, exact everywhere, and proven before use."""

import errno
import logging
import os
import stat

import pytest

from offload.scheduler.hostmem import allocate_pages
from offload.scheduler.storage import (
    NoSpace,
    OffloadIOError,
    PosixBackend,
    PosixFile,
    file_system,
    open_backend,
    prove,
    read_fully,
    view_of,
    write_fully,
)

PAGE = 4096


@pytest.mark.parametrize("direct", [True, False])
def test_every_length_from_nothing_to_three_pages_and_a_bit(tmp_path, direct):
    backend = PosixBackend(tmp_path, direct=direct)
    source = view_of(allocate_pages(4 * PAGE))
    source[:] = os.urandom(4 * PAGE)
    target = view_of(allocate_pages(4 * PAGE))
    sizes = [*range(0, 3 * PAGE + 8, 61), *(k * PAGE + d for k in (1, 2, 3) for d in (-1, 0, 1, 7))]
    file = backend.open("f", create=True)
    try:
        for size in sizes:
            for offset in (0, 513, PAGE):
                write_fully(file, source[:size], offset)
                target[:] = bytes(4 * PAGE)
                read_fully(file, target[:size], offset)
                assert target[:size] == source[:size], (size, offset)
                assert not any(target[size:])
    finally:
        file.close()


def test_aligned_requests_pass_by_the_page_cache_and_odd_ones_do_not_fail(tmp_path):
    backend = PosixBackend(tmp_path, direct=True)
    try:
        prove(backend)
    except OSError:
        pytest.skip("this file system has no direct I/O")
    file = backend.open("f", create=True)
    pages = view_of(allocate_pages(3 * PAGE))
    used = {name: file._descriptor(view, offset) for name, view, offset in (
        ("aligned", pages[:PAGE], PAGE), ("offset", pages[:PAGE], 512), ("length", pages[:100], 0),
        ("address", pages[8 : 8 + PAGE], 0), ("empty", pages[:0], 0))}  # fmt: skip
    assert {name for name, descriptor in used.items() if descriptor == file._direct} == {"aligned"}
    file.close()


def test_direct_and_buffered_requests_see_each_others_bytes(tmp_path):
    file = PosixBackend(tmp_path, direct=True).open("f", create=True)
    pages, odd = view_of(allocate_pages(2 * PAGE)), bytearray(100)
    pages[:] = b"a" * 2 * PAGE
    write_fully(file, pages, 0)
    write_fully(file, memoryview(b"b" * 100), 50)  # through the cache
    read_fully(file, pages, 0)  # direct
    assert bytes(pages) == b"a" * 50 + b"b" * 100 + b"a" * (2 * PAGE - 150)
    pages[:] = b"c" * 2 * PAGE
    write_fully(file, pages, 0)
    read_fully(file, memoryview(odd), 50)
    assert odd == b"c" * 100
    file.close()


def test_reserve_allocates_private_files_and_does_not_replace(tmp_path):
    backend = PosixBackend(tmp_path, direct=False)
    backend.reserve("f", 10 * PAGE)
    facts = os.stat(tmp_path / "f")
    assert (facts.st_size, stat.S_IMODE(facts.st_mode)) == (10 * PAGE, 0o600)
    assert facts.st_blocks * 512 >= 10 * PAGE
    with pytest.raises(FileExistsError):
        backend.reserve("f", PAGE)
    assert backend.size_nbytes("f") == 10 * PAGE


def test_reserve_removes_what_it_began_when_the_drive_is_full(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(NoSpace, match=r"cannot reserve 8192 bytes, \d+ bytes are free"):
        PosixBackend(tmp_path, direct=False).reserve("f", 2 * PAGE)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("lie", ["einval", "other bytes", "short"])
def test_a_file_system_that_fails_the_probe_gets_the_buffered_backend_and_one_warning(
    tmp_path, monkeypatch, caplog, lie
):
    honest = PosixFile.read_into

    def read_into(self, buffer, offset):
        if self._direct is None:
            return honest(self, buffer, offset)
        if lie == "einval":
            raise OSError(errno.EINVAL, "no")
        moved = honest(self, buffer, offset)
        buffer[-1] ^= lie == "other bytes"
        return moved - 512 if lie == "short" else moved

    monkeypatch.setattr(PosixFile, "read_into", read_into)
    with caplog.at_level(logging.WARNING):
        backend = open_backend(tmp_path)
    assert backend.direct is False
    assert len(caplog.records) == 1
    assert "direct I/O does not work here" in caplog.text
    assert os.listdir(tmp_path) == []


def test_a_file_system_that_cannot_even_do_buffered_io_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(PosixFile, "read_into", lambda self, buffer, offset: len(buffer))
    with pytest.raises(ValueError, match="gave back other bytes than were written"):
        open_backend(tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_truncated_file_is_named_with_offset_and_length(tmp_path):
    file = PosixBackend(tmp_path, direct=True).open("f", create=True)
    write_fully(file, view_of(allocate_pages(PAGE)), 0)
    with pytest.raises(OffloadIOError, match="shorter than the store made it") as caught:
        read_fully(file, view_of(allocate_pages(3 * PAGE)), 0)
    assert (caught.value.path, caught.value.offset, caught.value.nbytes) == (tmp_path / "f", PAGE, 2 * PAGE)
    assert caught.value.errno == errno.EIO
    file.close()


def test_using_a_closed_file_is_an_error_and_not_another_file(tmp_path):
    file = PosixBackend(tmp_path, direct=True).open("f", create=True)
    file.close()
    file.close()
    with pytest.raises(OffloadIOError) as caught:
        write_fully(file, view_of(allocate_pages(PAGE)), 0)
    assert caught.value.errno == errno.EBADF


def test_file_systems_are_recognised(tmp_path):
    assert file_system(tmp_path) not in ("unknown", "tmpfs") or str(tmp_path).startswith("/dev/shm")
    assert file_system("/proc") == "proc"
    if os.path.isdir("/dev/shm"):
        assert file_system("/dev/shm") == "tmpfs"
