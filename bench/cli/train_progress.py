"""What is shown while a run goes on: a live panel on a terminal, plain lines elsewhere, or nothing."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text

from ..memory import format_nbytes
from ..train import LANES, Progress

PLAIN_EVERY_S = 5.0  # a log file wants a line now and then, not one per step


class Shown(Protocol):
    """Where a run reports to."""

    def on_step(self, progress: Progress) -> None: ...

    def on_phase(self, phase: str) -> None: ...


@contextmanager
def progress(*, steps: int, quiet: bool) -> Iterator[Shown]:
    """The display that fits: silent if `quiet`, live on a terminal, else lines on stderr."""
    console = Console(stderr=True)
    if quiet:
        yield Silent()
    elif console.is_terminal:
        shown = Panel(console, steps)
        with shown.live:
            yield shown
    else:
        yield Lines(console, steps)


def lane_rates(progress: Progress) -> str:
    """GB/s by lane over the last step (GB = 1e9 B), lanes that moved nothing left out."""
    info = progress.info
    rates = [(lane, info.nbytes.get(lane, 0) / info.seconds / 1e9) for lane in LANES if info.seconds > 0]
    return "  ".join(f"{lane} {rate:.2f}" for lane, rate in rates if rate > 0) or "none"


def memory_use(progress: Progress) -> str:
    """Host and, where there is one, device memory against their budgets."""
    parts = [f"host {format_nbytes(progress.host_used_nbytes)} of {format_nbytes(progress.host_budget_nbytes)}"]
    if progress.device_budget_nbytes:
        used, budget = progress.device_used_nbytes, progress.device_budget_nbytes
        parts.append(f"device {format_nbytes(used)} of {format_nbytes(budget)}")
    return "  ".join(parts)


class Silent:
    def on_step(self, progress: Progress) -> None:
        del progress

    def on_phase(self, phase: str) -> None:
        del phase


class Lines:
    """One line per phase and, every few seconds, one for the step just finished."""

    def __init__(self, console: Console, steps: int) -> None:
        self.console = console
        self.steps = steps
        self.last_s = float("-inf")

    def on_phase(self, phase: str) -> None:
        self._print(phase)

    def on_step(self, progress: Progress) -> None:
        now_s = time.monotonic()
        if now_s - self.last_s < PLAIN_EVERY_S and progress.info.step < self.steps:
            return
        self.last_s = now_s
        skipped = "  SKIPPED: loss or gradient not finite" if progress.info.skipped else ""
        self._print(
            f"step {progress.info.step}/{self.steps}  loss {progress.loss:.4f}  {progress.tokens_per_s:.0f} tokens/s  "
            f"{memory_use(progress)}  GB/s: {lane_rates(progress)}{skipped}"
        )

    def _print(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


class Panel:
    """A progress bar and two lines under it, rewritten in place."""

    def __init__(self, console: Console, steps: int) -> None:
        self.bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[rate]} tokens/s"),
            TimeRemainingColumn(),
            console=console,
        )
        self.task = self.bar.add_task("train", total=steps, loss="-", rate="-")
        self.memory, self.rates = "-", "-"
        self.live = Live(self._render(), console=console, refresh_per_second=4, transient=True)

    def on_phase(self, phase: str) -> None:
        self.live.console.print(phase, markup=False, highlight=False)

    def on_step(self, progress: Progress) -> None:
        if progress.info.skipped:
            self.on_phase(f"step {progress.info.step} skipped: loss or gradient not finite")
        rate = f"{progress.tokens_per_s:.0f}"
        self.bar.update(self.task, advance=1, loss=f"{progress.loss:.4f}", rate=rate)
        self.memory, self.rates = memory_use(progress), lane_rates(progress)
        self.live.update(self._render())

    def _render(self) -> RenderableType:
        return Group(self.bar, Text(f"memory  {self.memory}"), Text(f"GB/s    {self.rates}"))
