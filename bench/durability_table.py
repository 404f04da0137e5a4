"""What durability and checksums cost: step times of one placement under each setting, in turns, from one run."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy

from .step_table import StepTable, run_alone

SETTINGS = (("none", False), ("none", True), ("10", True), ("step", False), ("step", True))


@dataclass(frozen=True, kw_only=True)
class DurabilityRow:
    """One setting. Seconds as (p20, median, p80); `relative` is the median over that of the first setting.

    `hash_share` is the CPU time that checksums took over the time of the same steps, measured in the hashing threads:
    if nothing of it were hidden behind the drive and the compute, a step would be so much longer.
    """

    durability: str
    verify: bool
    step_s: tuple[float, float, float]
    relative: float
    hash_share: float
    written_per_parameter: float


def measure_durability(table: StepTable, on_case: Callable[[str], None]) -> list[DurabilityRow]:
    """Run the first case of `table` under every setting, `table.rounds` times in turns, each in its own process.

    Raises: ValueError with the process's last words if a run fails.
    """
    case = table.cases[0]
    seconds: dict[tuple[str, bool], list[float]] = {setting: [] for setting in SETTINGS}
    hashing: dict[tuple[str, bool], list[float]] = {setting: [] for setting in SETTINGS}
    written: dict[tuple[str, bool], float] = {}
    for round_ in range(table.rounds):
        for setting in SETTINGS:
            durability, verify = setting
            on_case(f"round {round_ + 1} of {table.rounds}: durability {durability}, verify {verify}")
            result = run_alone(replace(table, durability=durability, verify=verify), case)
            seconds[setting] += result.step_s
            hashing[setting] += result.hash_s
            written[setting] = sum(result.write_nbytes) / len(result.write_nbytes) / result.num_parameters
    reference_s = float(numpy.median(seconds[SETTINGS[0]]))
    rows = []
    for (durability, verify), times in seconds.items():
        low, middle, high = (float(q) for q in numpy.percentile(times, (20, 50, 80)))
        rows.append(
            DurabilityRow(
                durability=durability,
                verify=verify,
                step_s=(low, middle, high),
                relative=middle / reference_s,
                hash_share=sum(hashing[durability, verify]) / sum(times),
                written_per_parameter=written[(durability, verify)],
            )
        )
    return rows
