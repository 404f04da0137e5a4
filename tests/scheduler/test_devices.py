"""Devices: the fake one is slow, has its own memory and poisons; one memory copies nothing."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from offload.scheduler.devices import Device, FakeDevice, OneMemoryDevice
from offload.scheduler.hostmem import allocate_pages

NBYTES = 1 << 16


def pattern(device: Device, value: int) -> torch.Tensor:
    return device.allocate_host(NBYTES).fill_(value)


@pytest.mark.parametrize("device", [FakeDevice(), OneMemoryDevice()], ids=lambda device: device.name)
def test_buffers_are_aligned_bytes(device: Device) -> None:
    for buffer in (device.allocate(NBYTES), device.allocate_host(NBYTES)):
        assert buffer.dtype == torch.uint8 and buffer.shape == (NBYTES,)
        assert buffer.data_ptr() % 64 == 0
    assert device.allocate_host(NBYTES).data_ptr() % 4096 == 0
    assert device.allocate(0).numel() == 0


def test_fake_memory_is_poisoned_until_something_arrives() -> None:
    device = FakeDevice()
    slot = device.allocate(NBYTES)
    assert slot.view(torch.float32).isnan().all() and slot.view(torch.bfloat16).isnan().all()
    device.upload(slot, pattern(device, 3), None)
    assert (slot == 3).all()
    back = pattern(device, 0)
    device.download(back, slot, None)
    assert (back == 3).all()
    assert device.poison() and not OneMemoryDevice().poison()


def test_fake_copies_arrive_in_two_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever does not wait for the copy sees nothing of it, then half of it: the race is widened, not hidden."""
    device = FakeDevice(seed=1)
    slot, source = device.allocate(NBYTES), pattern(device, 5)
    seen: list[tuple[bool, bool]] = []
    half = NBYTES // 2
    monkeypatch.setattr(
        time, "sleep", lambda s: seen.append((bool((slot[:half] == 5).all()), bool((slot[half:] == 5).any())))
    )
    device.upload(slot, source, None)
    assert seen == [(False, False), (True, False)]
    assert (slot == 5).all()


@pytest.mark.parametrize("seed", [0, 1])
def test_fake_delays_come_from_the_seed(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    delays: list[float] = []
    monkeypatch.setattr(time, "sleep", delays.append)

    def delays_of(seed: int) -> list[float]:
        delays.clear()
        device = FakeDevice(seed=seed, max_delay_s=0.5)
        for _ in range(4):
            device.upload(device.allocate(64), device.allocate_host(64), None)
        return list(delays)

    first = delays_of(seed)
    assert first == delays_of(seed) != delays_of(seed + 1)
    assert len(first) == 8 and all(0 <= delay < 0.5 for delay in first) and len(set(first)) == 8


def test_fake_copy_waits_for_the_event_it_is_given() -> None:
    device = FakeDevice(max_delay_s=0.0)
    passed, waiting = threading.Event(), threading.Event()

    class Late:
        def synchronize(self) -> None:
            waiting.set()
            assert passed.wait(20)

        def time_s(self) -> float:
            return 0.0

    slot, source = device.allocate(NBYTES), pattern(device, 9)
    thread = threading.Thread(target=device.upload, args=(slot, source, Late()))
    thread.start()
    assert waiting.wait(20)
    assert (slot == 0xFF).all(), "nothing may move before the event has passed"
    passed.set()
    thread.join(20)
    assert (slot == 9).all()


def test_fake_link_directions_each_take_bytes_over_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies queue within their direction only; a clock that moves when somebody sleeps tells when each ends."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    device = FakeDevice(max_delay_s=0.0, h2d_gb_s=1e-9 * NBYTES, d2h_gb_s=2e-9 * NBYTES)
    slot, host = device.allocate(NBYTES), pattern(device, 1)
    device.upload(slot, host, None)
    assert now[0] == pytest.approx(101.0)
    device.download(host, slot, None)
    assert now[0] == pytest.approx(101.5)
    now[0] = 101.0  # seen from another thread: the next upload waits for the end of no download
    device.upload(slot, host, None)
    assert now[0] == pytest.approx(102.0)
    now[0] = 101.25  # while that upload is on its way
    device.upload(slot, host, None)
    assert now[0] == pytest.approx(103.0)


@pytest.mark.parametrize("speeds", [{"h2d_gb_s": 0}, {"d2h_gb_s": -1.0}])
def test_a_link_without_bandwidth_is_refused(speeds: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be above zero"):
        FakeDevice(**speeds)


def test_copy_of_another_size_is_refused() -> None:
    device = FakeDevice()
    with pytest.raises(ValueError, match=r"copy of 64 bytes into a buffer of 128 bytes"):
        device.upload(device.allocate(128), device.allocate_host(64), None)


def test_one_memory_refuses_to_copy() -> None:
    device = OneMemoryDevice()
    assert device.one_memory and device.free_nbytes() is None
    for copy in (device.upload, device.download):
        with pytest.raises(AssertionError, match="one memory"):
            copy(device.allocate(64), device.allocate_host(64), None)


@pytest.mark.parametrize("device", [FakeDevice(), OneMemoryDevice()], ids=lambda device: device.name)
def test_host_events_have_passed_when_they_are_made(device: Device) -> None:
    before = time.perf_counter()
    event = device.record()
    event.synchronize()
    assert before <= event.time_s() <= time.perf_counter()


def test_pages_go_back_to_the_system() -> None:
    """malloc would keep them: an own mapping disappears with its last reference."""

    def resident() -> int:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * 4096

    before = resident()
    buffer = allocate_pages(64 << 20)
    assert buffer.data_ptr() % 4096 == 0 and not buffer.any()
    buffer.fill_(1)
    assert resident() - before > 60 << 20
    del buffer
    assert resident() - before < 4 << 20
    assert allocate_pages(0).numel() == 0
