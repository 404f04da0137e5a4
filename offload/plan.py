"""The plan: which (unit, kind) rests where, and how the host budget is cut. Made before anything is allocated."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from .layout import Chunk, UnitLayout
from .scheduler.pool import page_ceil
from .sizes import format_size
from .units import CallSite

PLACED_KINDS = ("param", "grad", "states")
"""In the order in which DRAM is given out. Bytes saved per step per byte held: a parameter saves two reads and a write,
gradients and states one of each; gradients come before states because backward waits for them."""

RING_DEPTH, RING_DEPTH_MOST = 3, 8
"""Chunks in flight: one being read, one worked on, one written; and as many as keep a deep drive busy both ways."""

DEVICE_RING_DEPTH = 4
"""Chunks on the device: one arriving, one worked on, one leaving, and one that waits for the first to have arrived."""


def device_chunks(layouts: Sequence[UnitLayout], share: float) -> list[Chunk]:
    """The chunks that are updated on the device: `share` of all (0 to 1), evenly spread over all units."""
    chunks = [chunk for layout in layouts for chunk in layout.chunks if chunk.segment != "frozen"]
    return [chunk for k, chunk in enumerate(chunks) if math.floor((k + 1) * share) > math.floor(k * share)]


class BudgetTooSmall(ValueError):
    """A memory budget that cannot run the model; the message names the unit and the smallest budget that works.

    `needed_nbytes` is that budget, `setting` the one that is too small.
    """

    def __init__(self, message: str, needed_nbytes: int, setting: str) -> None:
        super().__init__(message)
        self.needed_nbytes = needed_nbytes
        self.setting = setting


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The placement. All sizes in bytes.

    Args:
        homes: for each unit, kind -> "host" or "nvme" ("frozen" follows "param").
        rest_nbytes: host memory of everything that rests there.
        ring_nbytes: host memory of the ring through which states stream.
        stage_nbytes: host memory for units and gradients on their way.
        device_nbytes: device memory for staged units (0 where it is the host's).
        device_ring_nbytes: device memory for chunks that are updated there.
    """

    homes: tuple[Mapping[str, str], ...]
    rest_nbytes: int
    ring_nbytes: int
    stage_nbytes: int
    device_nbytes: int
    device_ring_nbytes: int

    @property
    def host_nbytes(self) -> int:
        return self.rest_nbytes + self.ring_nbytes + self.stage_nbytes


class Planner:
    """Makes a plan.

    Args:
        forced: kind -> tier for kinds that the user has placed.
        device_share: the share of chunks that are updated on the device.
        has_nvme: whether there is an NVMe tier at all.
        one_memory: whether units compute in host memory.
    """

    def __init__(
        self,
        layouts: Sequence[UnitLayout],
        call_sites: Sequence[CallSite],
        *,
        host_nbytes: int,
        device_nbytes: int,
        one_memory: bool,
        has_nvme: bool,
        forced: Mapping[str, str],
        device_share: float = 0.0,
    ) -> None:
        self._layouts = layouts
        self._sites = call_sites
        self._host_nbytes = host_nbytes
        self._device_nbytes = device_nbytes
        self._one_memory = one_memory
        self._has_nvme = has_nvme
        self._forced = forced
        on_device = set(device_chunks(layouts, device_share))
        self._device_item = max(
            (layout.chunk_nbytes(chunk) for layout in layouts for chunk in layout.chunks if chunk in on_device),
            default=0,
        )

    def make(self) -> Plan:
        """Raises: BudgetTooSmall with the unit, the numbers and the smallest budget that works."""
        self._check_device()
        homes = [{kind: "nvme" if self._may_spill(kind) else "host" for kind in PLACED_KINDS} for _ in self._layouts]
        floor = self._needs(homes)
        if sum(floor) > self._host_nbytes:
            raise BudgetTooSmall(self._too_small(floor), sum(floor), "host_memory")
        for index, kind in self._in_order():
            if kind not in self._forced and self._has_nvme:
                homes[index][kind] = "host"
                if sum(self._comfort(homes)) > self._host_nbytes:
                    homes[index][kind] = "nvme"
        rest, ring, stage = self._comfort(homes)
        if rest + ring + stage > self._host_nbytes:
            rest, ring, stage = self._needs(homes)
        if self._stages_anything(homes):
            stage = self._host_nbytes - rest - ring  # what is left widens the prefetch window
        return Plan(
            homes=tuple({**home, "frozen": home["param"]} for home in homes),
            rest_nbytes=rest,
            ring_nbytes=ring,
            stage_nbytes=stage,
            device_nbytes=self._device_nbytes - self._device_ring(),
            device_ring_nbytes=self._device_ring(),
        )

    def _in_order(self) -> Iterator[tuple[int, str]]:
        """(unit, kind) in the order in which DRAM is given out: all units of one kind after the other. A frozen base
        comes last, because it is never written; the adapters in it have their gradients and states in DRAM first."""
        with_frozen = [layout.nbytes("frozen") > 0 for layout in self._layouts]
        for kind in PLACED_KINDS:
            yield from ((i, kind) for i, frozen in enumerate(with_frozen) if not (frozen and kind == "param"))
        yield from ((i, "param") for i, frozen in enumerate(with_frozen) if frozen)

    def _may_spill(self, kind: str) -> bool:
        return self._forced.get(kind, "nvme" if self._has_nvme else "host") == "nvme"

    def _check_device(self) -> None:
        if self._one_memory:
            return
        need, who = self._largest_call()
        ring = f", and an update there {format_size(self._device_item)} for one chunk" if self._device_item else ""
        smallest = need + self._device_item
        if smallest > self._device_nbytes:
            raise BudgetTooSmall(
                f"device_memory is {format_size(self._device_nbytes)}, but the call of {who} needs its parameters "
                f"whole, "
                f"{format_size(need)}{ring}; the smallest device_memory that works is {smallest} bytes",
                smallest,
                "device_memory",
            )

    def _device_ring(self) -> int:
        """Bytes of the ring on the device: deep enough to overlap, as far as that leaves room for a unit to come while
        a call runs."""
        if not self._device_item:
            return 0
        call, _ = self._largest_call()
        next_unit = max(page_ceil(layout.staged_nbytes) for layout in self._layouts)
        depth = (self._device_nbytes - call - next_unit) // self._device_item
        return self._device_item * min(max(depth, 1), DEVICE_RING_DEPTH)

    def _largest_call(self) -> tuple[int, str]:
        """Bytes of the parameters that one call needs at once, and its name."""
        best = (0, "")
        for site in self._sites:
            nbytes = sum(page_ceil(self._layouts[unit.index].staged_nbytes) for unit in site.units)
            best = max(best, (nbytes, repr(site.name or "the model")))
        return best

    def _needs(self, homes: Sequence[Mapping[str, str]], window: int = 1, ring_depth: int = 1) -> tuple[int, int, int]:
        """(rest, ring, stage) bytes that a placement needs at least."""
        rest = ring = gradient = largest_stage = 0
        for layout, home in zip(self._layouts, homes, strict=True):
            for kind in PLACED_KINDS:
                if home[kind] == "host":
                    rest += page_ceil(layout.nbytes(kind) + (layout.nbytes("frozen") if kind == "param" else 0))
            ring = max(ring, self._ring_item(layout, home))
            gradient = max(gradient, self._gradient_room(layout, home))
            if home["param"] == "nvme":
                largest_stage = max(largest_stage, page_ceil(layout.staged_nbytes))
        stage = 0
        if largest_stage:
            call, _ = self._largest_call()
            stage = call + (window - 1) * largest_stage if self._one_memory else window * largest_stage
        return rest, ring * ring_depth, stage + gradient

    def _comfort(self, homes: Sequence[Mapping[str, str]]) -> tuple[int, int, int]:
        """What a placement needs to overlap: a window of one unit beside the one in use, a ring of a few chunks, or of
        more where an eighth of the budget holds them."""
        items = [self._ring_item(layout, home) for layout, home in zip(self._layouts, homes, strict=True)]
        item = max(items, default=0)
        depth = min(RING_DEPTH_MOST, self._host_nbytes // 8 // item) if item else 0
        return self._needs(homes, window=2, ring_depth=max(RING_DEPTH, depth))

    def _stages_anything(self, homes: Sequence[Mapping[str, str]]) -> bool:
        return self._needs(homes)[2] > 0

    def _ring_item(self, layout: UnitLayout, home: Mapping[str, str]) -> int:
        """Largest lease that one chunk takes of the ring."""
        largest = 0
        for chunk in layout.chunks:
            kinds = {**home, "frozen": home["param"]}
            nbytes = sum(layout.pieces[kind][piece] for kind, piece in chunk.pieces.items() if kinds[kind] == "nvme")
            largest = max(largest, page_ceil(nbytes))
        return largest

    def _gradient_room(self, layout: UnitLayout, home: Mapping[str, str]) -> int:
        """Largest lease that one unit's gradient takes on its way home."""
        link = 0
        if not self._one_memory:  # sums that were held back cross in fp32, where several backwards are added up
            widths = {i: 4 if layout.grad_fp32 else i.dtype.itemsize for i in layout.unit.parameters if i.trainable}
            link = sum(info.numel * width for info, width in widths.items())
        spill = layout.nbytes("grad") if home["grad"] == "nvme" else 0
        return page_ceil(spill + link)

    def _too_small(self, floor: tuple[int, int, int]) -> str:
        rest, ring, stage = floor
        largest = max(self._layouts, key=lambda layout: layout.staged_nbytes).unit
        parts = []
        if rest:
            parts.append(f"{format_size(rest)} for what must rest in host memory")
        if ring:
            parts.append(f"{format_size(ring)} for one chunk of states on its way")
        if stage:
            parts.append(f"{format_size(stage)} for the largest unit, {largest.name!r}, and a gradient on their way")
        mend = f"the smallest host_memory that works is {sum(floor)} bytes ({format_size(sum(floor))})"
        if not self._has_nvme:
            mend += "; or give nvme=..., so that states can rest there"
        return f"host_memory is {format_size(self._host_nbytes)}, but this model needs {' + '.join(parts)}; {mend}"
