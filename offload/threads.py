"""How many threads compute, update and move bytes: planned before anything runs, and shown with the units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

IO_PER_DRIVE = 6  # for each of reading and writing: they hash as well, so a few more than the drive needs
KINDS = ("update", "io")


@dataclass(frozen=True, kw_only=True)
class Threads:
    """The threads of one engine.

    Args:
        compute: torch's own, which work in the training thread's calls; they never change, because sums over another
            number of threads would have other bits.
        update: those of the `cpu` lane: updates, sums of gradients, copies.
        io: those that read, and as many that write; they also hash.
        cores: cores that the process may use.
    """

    compute: int
    update: int
    io: int
    cores: int

    def __str__(self) -> str:
        return f"{self.compute} compute, {self.update} update, {self.io} read, {self.io} write, on {self.cores} cores"


def plan_threads(chosen: Mapping[str, int], *, cores: int, drives: int) -> Threads:
    """The threads for a machine; `chosen` has those that the user set."""
    return Threads(
        compute=torch.get_num_threads(),
        update=chosen.get("update", cores),
        io=chosen.get("io", IO_PER_DRIVE * max(1, drives)),
        cores=cores,
    )


def check_threads(chosen: Mapping[str, int]) -> None:
    """Raises: ValueError for an unknown kind of thread or a number below 1."""
    for kind, number in chosen.items():
        if kind not in KINDS:
            mend = "; torch.set_num_threads(n) before the engine sets those that compute" if kind == "compute" else ""
            raise ValueError(f"threads has {kind!r}; kinds are {', '.join(map(repr, KINDS))}{mend}")
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise ValueError(f"threads[{kind!r}] is {number!r}; expected a whole number of at least 1")
