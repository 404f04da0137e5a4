"""Tokens per second of plain torch against the engine, case beside case, from one run.

Each case runs in a process of its own, `rounds` times, in turns with the others, so that a machine that grows warm or
busy treats them alike. What stands in the table is the median over all counted steps with the 20th and 80th percentile.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy

from offload.bound import Bound, StepWork, Work, lower_bound, update_share
from offload.scheduler.rig import Rig

from .models.gpt import preset
from .step_case import CASES, HOMES, StepCase, StepResult


@dataclass(frozen=True, kw_only=True)
class StepTable:
    """Which cases to run, on which model, how often. `nvme` is an existing folder; each case gets a new one inside.

    With a `rig`, and the case "plain" beside them, each of the engine's cases has its lower bound.
    """

    cases: tuple[str, ...] = ("plain", "memory", "states-nvme", "nvme")
    model: str = "base"
    batch: int = 8
    seq: int = 256
    rounds: int = 3
    warm_up: int = 1
    steps: int = 2
    dtype: str = "bfloat16"
    device: str = "auto"
    nvme: Path = Path()
    host_memory: str | int = "auto"
    durability: str = "step"
    verify: bool = True
    update: str = "auto"
    rig: Rig | None = None

    def __post_init__(self) -> None:
        unknown = [case for case in self.cases if case not in CASES]
        if unknown or not self.cases:
            raise ValueError(f"Cases {unknown or '(none)'} asked for, expected some of {', '.join(CASES)}.")
        if not self.nvme.is_dir():
            raise ValueError(f"--nvme {str(self.nvme)!r} is not a folder. Make it on the drive to be measured.")
        preset(self.model)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table. Times in seconds as (p20, median, p80); bytes per parameter and step; RSS in bytes."""

    case: str
    label: str
    tokens_per_s: float
    relative: float
    step_s: tuple[float, float, float]
    exposed_share: float
    read_per_parameter: float
    write_per_parameter: float
    expected_read: float
    expected_write: float
    baseline_rss_nbytes: int
    peak_rss_nbytes: int
    device_peak_nbytes: int
    last_loss: float
    bound_s: float | None = None
    bound_lane: str | None = None

    @property
    def bound_ratio(self) -> float | None:
        """Median step over its bound."""
        return None if self.bound_s is None else self.step_s[1] / self.bound_s


def expected_nbytes(case: str, dtype: str, durability: str = "none") -> tuple[float, float]:
    """NVMe bytes (read, written) per parameter and step that the placement of `case` asks for.

    With 16-bit parameters and the split master: states are low half 2 + moments 8, read and written once. Parameters
    on NVMe are read for forward and again for backward, where the update reuses them, and written once: + 4 and + 2.
    A gradient on NVMe is written and read once in the parameter's dtype. With float32 parameters the master is the
    parameter, so states are 8 and every 2 becomes 4. What rests in host memory is written too at each commit.
    """
    homes = HOMES.get(case, {})
    width, states = (2, 10) if dtype == "bfloat16" else (4, 8)
    read = write = 0.0
    if homes.get("states") == "nvme":
        read, write = read + states, write + states
    if homes.get("param") == "nvme":
        read, write = read + 2 * width, write + width
    if homes.get("grad") == "nvme":
        read, write = read + width, write + width
    if durability != "none" and "nvme" in homes.values():
        resting = states * (homes["states"] == "host") + width * (homes["param"] == "host")
        write += resting / (1 if durability == "step" else int(durability))
    return read, write


def measure(table: StepTable, on_case: Callable[[str], None]) -> tuple[list[Row], list[StepResult]]:
    """Run every case and return the rows in the order of `table.cases` and every process's raw result.

    `on_case` gets a sentence before each process.
    Raises: ValueError with the process's last words if a case fails.
    """
    results: list[StepResult] = []
    for round_ in range(table.rounds):
        for case in table.cases:
            on_case(f"round {round_ + 1} of {table.rounds}: {CASES[case]}")
            results.append(run_alone(table, case))
    medians = {case: float(numpy.median(_all_steps(results, case))) for case in table.cases}
    reference_s = medians.get("plain", medians[table.cases[0]])
    return [_row(table, case, results, reference_s) for case in table.cases], results


def run_alone(table: StepTable, case: str) -> StepResult:
    with tempfile.TemporaryDirectory(dir=table.nvme, prefix=f"step-{case}-") as folder:
        wanted = StepCase(
            case=case,
            model=table.model,
            batch=table.batch,
            seq=table.seq,
            warm_up=table.warm_up,
            steps=table.steps,
            dtype=table.dtype,
            device=table.device,
            nvme=folder if "nvme" in HOMES.get(case, {}).values() else None,
            host_memory=table.host_memory,
            durability=table.durability,
            verify=table.verify,
            update=table.update,
        )
        command = [sys.executable, "-P", "-m", "offload.bench.step_case", json.dumps(asdict(wanted))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise ValueError(f"The case {CASES[case]!r} did not finish: {last}")
    return StepResult(**json.loads(done.stdout.splitlines()[-1]))


def _all_steps(results: list[StepResult], case: str) -> list[float]:
    return [seconds for result in results if result.case == case for seconds in result.step_s]


def _row(table: StepTable, case: str, results: list[StepResult], plain_s: float) -> Row:
    own = [result for result in results if result.case == case]
    steps = _all_steps(results, case)
    low, middle, high = (float(value) for value in numpy.percentile(steps, (20, 50, 80)))
    num_parameters = own[0].num_parameters
    reads = [nbytes for result in own for nbytes in result.read_nbytes]
    writes = [nbytes for result in own for nbytes in result.write_nbytes]
    expected_read, expected_write = expected_nbytes(case, table.dtype, table.durability)
    bound = _bound(table, case, results)
    return Row(
        case=case,
        label=CASES[case],
        tokens_per_s=table.batch * table.seq / middle,
        relative=plain_s / middle,
        step_s=(low, middle, high),
        exposed_share=sum(sum(result.exposed_s) for result in own) / sum(steps),
        read_per_parameter=sum(reads) / len(steps) / num_parameters,
        write_per_parameter=sum(writes) / len(steps) / num_parameters,
        expected_read=expected_read,
        expected_write=expected_write,
        baseline_rss_nbytes=max(result.baseline_rss_nbytes for result in own),
        peak_rss_nbytes=max(result.peak_rss_nbytes for result in own),
        device_peak_nbytes=max(result.device_peak_nbytes for result in own),
        last_loss=own[-1].losses[-1],
        bound_s=None if bound is None else bound.bound_s,
        bound_lane=None if bound is None else bound.lane,
    )


def _bound(table: StepTable, case: str, results: list[StepResult]) -> Bound | None:
    """The least time that a step of `case` takes on the rig: bytes from its placement, compute from plain torch."""
    plain = [seconds for result in results if result.case == "plain" for seconds in result.compute_s]
    work = next((result.work for result in results if result.case == case), None)
    if table.rig is None or work is None or not plain:
        return None
    forward_s, backward_s = (float(value) for value in numpy.median(plain, axis=0))
    return lower_bound(
        StepWork(**{phase: Work(**amounts) for phase, amounts in work.items()}),
        table.rig,
        forward_s=forward_s,
        backward_s=backward_s,
        alpha=update_share(table.update, clips=False),
        compute_on_cores=table.rig.one_memory,
    )
