"""The lower bound of a step: what its bytes and its compute take at least, whatever order they run in.

Bytes follow from the placement alone, never from what an engine counted. A step has two phases. *Forward* is the pass
in which a pending update must be made before each unit's use: that of the first micro-batch, or of all micro-batches
where they go through the units together (vertical). *Backward* is everything after it. What the optimizer moves may lie
in either, wholly or in part; where the norm of all gradients must be known first, it lies in the next forward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .layout import UnitLayout
from .scheduler.rig import GB, Rig
from .scheduler.trace import Span

SERIAL = ("compute", "h2d", "d2h", "drive", "cpu", "dram")
"""The lanes whose busy seconds bound a step; `read` and `write` are shown beside them, `drive` is both by its law."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What must be moved and updated, by lane.

    Args:
        h2d, d2h: bytes across the link.
        read, write: bytes of the drives.
        elements: parameters that the optimizer updates.
        dram: bytes of host memory that transfers and kernels read and write.
    """

    h2d: float = 0.0
    d2h: float = 0.0
    read: float = 0.0
    write: float = 0.0
    elements: float = 0.0
    dram: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            h2d=self.h2d + other.h2d,
            d2h=self.d2h + other.d2h,
            read=self.read + other.read,
            write=self.write + other.write,
            elements=self.elements + other.elements,
            dram=self.dram + other.dram,
        )

    def __mul__(self, share: float) -> Work:
        return Work(
            h2d=self.h2d * share,
            d2h=self.d2h * share,
            read=self.read * share,
            write=self.write * share,
            elements=self.elements * share,
            dram=self.dram * share,
        )


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """The work of one step, by when it must be done.

    Args:
        forward, backward: bound to its phase.
        update: the optimizer's, which may lie in either phase.
        commit: copies for durability, which may lie in either phase.
    """

    forward: Work
    backward: Work
    update: Work
    commit: Work

    @property
    def total(self) -> Work:
        return self.forward + self.backward + self.update + self.commit


def step_work(
    layouts: Sequence[UnitLayout],
    homes: Sequence[Mapping[str, str]],
    *,
    one_memory: bool,
    micro_batches: int = 1,
    vertical: bool = True,
    commit_interval: int | None = None,
    reuse_nbytes: int = 0,
) -> StepWork:
    """The byte table of a placement, summed over its units; padding counts.

    Args:
        homes: for each unit, kind -> "host" or "nvme" (`Plan.homes`).
        one_memory: whether units compute in host memory, so that no link is crossed.
        vertical: whether one fetch of a unit serves all micro-batches.
        commit_interval: steps between commits, to which also what rests in host memory is written; None: never.
        reuse_nbytes: staged units that may stay where they compute when a pass turns around; 0 gives the plain table.
    """
    passes = 1 if vertical else micro_batches
    forward = backward = update = commit = Work()
    staged = staged_nvme = 0
    for layout, home in zip(layouts, homes, strict=True):
        fetch = _fetch(layout, home, one_memory)
        staged += layout.staged_nbytes
        staged_nvme += layout.staged_nbytes * (home["param"] == "nvme")
        forward += fetch
        backward += fetch * (2 * passes - 1)
        backward += _gradient(layout, home, one_memory, micro_batches, vertical)
        update += _update(layout, home)
        commit += _commit(layout, home, commit_interval)
    kept, kept_nvme = min(staged, reuse_nbytes), min(staged_nvme, reuse_nbytes)
    turns = 2 * passes - 1
    # A step's end is a turn as well, but across a link the new parameters must follow the update.
    forward += Work(read=-kept_nvme if one_memory else 0)
    backward += Work(read=-turns * kept_nvme, h2d=0 if one_memory else -turns * kept)
    return StepWork(forward=forward, backward=backward, update=update, commit=commit)


def _fetch(layout: UnitLayout, home: Mapping[str, str], one_memory: bool) -> Work:
    """A unit's parameters on their way to compute, once; an update on the way shares the read."""
    nbytes, on_drive = layout.staged_nbytes, home["param"] == "nvme"
    return Work(h2d=0 if one_memory else nbytes, read=nbytes * on_drive, dram=nbytes * (1 + on_drive))


def _gradient(
    layout: UnitLayout, home: Mapping[str, str], one_memory: bool, micro_batches: int, vertical: bool
) -> Work:
    """A unit's gradients of all micro-batches on their way home, where they are summed."""
    once, kept, on_drive = layout.nbytes("param"), layout.nbytes("grad"), home["grad"] == "nvme"
    crossing = min(kept, micro_batches * once) if vertical else micro_batches * once
    sums = 1 if vertical else micro_batches
    return Work(
        d2h=0 if one_memory else crossing,
        read=(sums - 1) * kept * on_drive,
        write=sums * kept * on_drive,
        dram=crossing + 2 * (sums - 1) * kept + (2 * sums - 1) * kept * on_drive,
    )


def _update(layout: UnitLayout, home: Mapping[str, str]) -> Work:
    """A unit's update: states there and back, the gradient in, the new parameters out."""
    states, grad, param = (layout.nbytes(kind) for kind in ("states", "grad", "param"))
    on_drive = {kind: home[kind] == "nvme" for kind in ("states", "grad", "param")}
    read = states * on_drive["states"] + grad * on_drive["grad"]
    write = states * on_drive["states"] + param * on_drive["param"]
    return Work(
        read=read,
        write=write,
        elements=sum(chunk.numel for chunk in layout.chunks if chunk.segment != "frozen"),
        dram=2 * states + 2 * param + grad + read + write,
    )


def _commit(layout: UnitLayout, home: Mapping[str, str], interval: int | None) -> Work:
    """What rests in host memory is written at each commit; what rests on the drives has been already."""
    if interval is None:
        return Work()
    resting = sum(layout.nbytes(kind) for kind in ("param", "states") if home[kind] == "host")
    return Work(write=resting / interval, dram=resting / interval)


@dataclass(frozen=True, kw_only=True)
class Bound:
    """Seconds that a step takes at least, on one rig.

    Args:
        forward_s, backward_s: busy seconds by lane in each phase, the optimizer's share where `alpha` puts it (half
            and half where it is None) and commits where they cost least.
        phase_s: the slowest lane of forward and the slowest of backward, one after the other.
        global_s: the slowest lane over the whole step, as if nothing had to wait for the end of a phase.
        alpha: the share of the update that lies in forward; None where it may lie wherever it costs nothing.
    """

    forward_s: Mapping[str, float]
    backward_s: Mapping[str, float]
    phase_s: float
    global_s: float
    alpha: float | None

    @property
    def bound_s(self) -> float:
        """The bound that holds: that of the phases where the update is tied to one, else that of the whole step."""
        return self.global_s if self.alpha is None else self.phase_s

    @property
    def busy_s(self) -> dict[str, float]:
        """Busy seconds by lane over the whole step."""
        return {lane: self.forward_s[lane] + self.backward_s[lane] for lane in self.forward_s}

    @property
    def lane(self) -> str:
        """The slowest lane over the whole step."""
        busy_s = self.busy_s
        return max(SERIAL, key=lambda lane: busy_s[lane])


def lower_bound(
    work: StepWork,
    rig: Rig,
    *,
    forward_s: float,
    backward_s: float,
    alpha: float | None,
    compute_on_cores: bool = False,
) -> Bound:
    """The bound of `work` on `rig`.

    Args:
        forward_s, backward_s: compute seconds of the phases; backward's include recomputation, and with several
            micro-batches one after another all passes but the first forward.
        alpha: share of the update that lies in forward; 1 where all gradients must be known first (see `update_share`).
        compute_on_cores: whether the model computes on the cores that update: then `cpu` is both.
    """
    if alpha is not None and not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; the share of the update that lies in forward is in [0, 1], or None")
    share = 0.5 if alpha is None else alpha

    def phases(committed: float) -> tuple[dict[str, float], dict[str, float]]:
        early = work.forward + work.update * share + work.commit * committed
        late = work.backward + work.update * (1 - share) + work.commit * (1 - committed)
        return _busy(early, forward_s, rig, compute_on_cores), _busy(late, backward_s, rig, compute_on_cores)

    def length_s(committed: float) -> float:
        return sum(_slowest(phase) for phase in phases(committed))

    forward, backward = phases(_least(length_s) if work.commit != Work() else 0.5)
    whole = _busy(work.total, forward_s + backward_s, rig, compute_on_cores)
    global_s = _slowest(whole)
    phase_s = global_s if alpha is None else _slowest(forward) + _slowest(backward)
    return Bound(forward_s=forward, backward_s=backward, phase_s=phase_s, global_s=global_s, alpha=alpha)


def update_share(update: str, *, clips: bool) -> float | None:
    """The share of the update that a step must leave to the next forward: all where the norm comes first.

    Speculation ("auto" may speculate) does not wait for the norm, and without clipping an update may begin with its
    unit's last gradient.
    """
    return 1.0 if clips and update not in ("speculative", "auto") else None


def _busy(work: Work, compute_s: float, rig: Rig, compute_on_cores: bool) -> dict[str, float]:
    if (work.h2d or work.d2h) and rig.link is None:
        raise ValueError(f"rig {rig.name!r} has one memory, but the placement is of a device with its own")
    drive, link, cores = rig.drive, rig.link, rig.cores
    update_s = work.elements / (cores.count * cores.update_elements_s)
    return {
        "compute": compute_s,
        "h2d": work.h2d / (link.h2d_gb_s * GB) if link is not None else 0.0,
        "d2h": work.d2h / (link.d2h_gb_s * GB) if link is not None else 0.0,
        "read": work.read / (drive.read_gb_s * GB) if drive is not None else 0.0,
        "write": work.write / (drive.write_gb_s * GB) if drive is not None else 0.0,
        "drive": rig.service_s(work.read, work.write),
        "cpu": update_s + (compute_s if compute_on_cores else 0.0),
        "dram": work.dram / (cores.dram_gb_s * GB),
    }


def _slowest(busy_s: Mapping[str, float]) -> float:
    return max(busy_s[lane] for lane in SERIAL)


def _least(length_s: Callable[[float], float]) -> float:
    """Where in [0, 1] the convex function `length_s` is least."""
    low, high = 0.0, 1.0
    for _ in range(25):  # (2/3)^25 of the whole: 4e-5
        left, right = low + (high - low) / 3, high - (high - low) / 3
        if length_s(left) <= length_s(right):
            high = right
        else:
            low = left
    return (low + high) / 2


class EngineBound:
    """The bound of an engine's own steps on a rig, from its placement and from how long its compute took."""

    def __init__(
        self,
        rig: Rig,
        layouts: Sequence[UnitLayout],
        homes: Sequence[Mapping[str, str]],
        *,
        one_memory: bool,
        micro_batches: int,
        commit_interval: int | None,
        reuse_nbytes: int,
        update: str,
        clips: bool,
    ) -> None:
        self._rig = rig
        self._one_memory = one_memory
        self._alpha = update_share(update, clips=clips)
        self._work = {
            vertical: step_work(
                layouts,
                homes,
                one_memory=one_memory,
                micro_batches=micro_batches,
                vertical=vertical,
                commit_interval=commit_interval,
                reuse_nbytes=reuse_nbytes,
            )
            for vertical in (False, True)
        }

    def of(self, spans: Sequence[Span], vertical: bool) -> Bound:
        """The bound of the step that left `spans`; its compute counts as long as it took."""
        seconds = {
            phase: sum(s.end_s - s.start_s for s in spans if s.lane == "compute" and s.kind == phase)
            for phase in ("forward", "backward")
        }
        return lower_bound(
            self._work[vertical],
            self._rig,
            forward_s=seconds["forward"],
            backward_s=seconds["backward"],
            alpha=self._alpha,
            compute_on_cores=self._one_memory,
        )
