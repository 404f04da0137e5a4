"""The table at the end of a run."""

from rich.console import Console
from rich.table import Table

from ..machine import Machine
from ..memory import format_nbytes
from ..train import LANES, TrainOptions, TrainReport


def print_report(report: TrainReport, options: TrainOptions, machine: Machine) -> None:
    """Print the machine, the table and the sample on standard output."""
    console = Console(highlight=False)
    for line in machine.lines():
        console.print(line, markup=False, style="dim", soft_wrap=True)
    table = Table(show_header=False, pad_edge=False)
    for name, value in rows(report, options):
        table.add_row(name, value)
    console.print(table)
    if report.sample:
        console.print("Sample:", style="bold")
        console.print(printable(report.sample), markup=False, soft_wrap=True)


def printable(sample: str) -> str:
    """The sample without control characters, which an untrained model emits and a terminal would obey."""
    return "".join(char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in sample)


def rows(report: TrainReport, options: TrainOptions) -> list[tuple[str, str]]:
    """Name and value of every line of the table."""
    steps = max(1, report.steps)
    table = [
        ("model", f"{report.num_parameters / 1e6:.1f}M parameters, {str(options.config.dtype).removeprefix('torch.')}"),
        ("trained", f"{report.steps} steps of {options.tokens_per_step} bytes in {report.seconds:.1f} s"),
        ("loss, first and last step", f"{report.first_loss:.4f} -> {report.last_loss:.4f} nats per byte"),
        (
            "held-out loss, before and after",
            f"{report.held_out_before:.4f} -> {report.held_out_after:.4f} nats per byte",
        ),
        ("tokens/s", f"{report.tokens_per_s:.0f}"),
    ]
    if report.bound_ratio is not None:
        table.append(("step over its lower bound", f"{report.bound_ratio:.2f} (median, on the rig given)"))
    if report.skipped_steps:
        table.append(("skipped steps", f"{report.skipped_steps} (loss or gradient not finite)"))
    for lane, verb in (("read", "read from NVMe"), ("write", "written to NVMe")):
        nbytes = report.nbytes[lane]
        per = nbytes / steps / report.num_parameters
        table.append((verb, f"{format_nbytes(nbytes)}, {per:.1f} B per parameter and step"))
    return table + _memory_rows(report) + _wait_rows(report)


def _memory_rows(report: TrainReport) -> list[tuple[str, str]]:
    against = report.host_budget_nbytes + report.baseline_rss_nbytes
    table = [
        (
            "host memory, peak of budget",
            f"{format_nbytes(report.host_peak_nbytes)} of {format_nbytes(report.host_budget_nbytes)}",
        ),
        (
            "peak RSS against budget",
            f"{format_nbytes(report.peak_rss_nbytes)} against {format_nbytes(against)} "
            f"(budget + {format_nbytes(report.baseline_rss_nbytes)} of Python and torch)",
        ),
        (
            "outside the budget",
            f"boundaries {format_nbytes(report.boundaries_nbytes)}, one unit's temporaries "
            f"{format_nbytes(report.temporaries_nbytes)}, logits {format_nbytes(report.logits_nbytes)}",
        ),
    ]
    if report.device_budget_nbytes:
        peak, budget = report.device_peak_nbytes, report.device_budget_nbytes
        table.insert(1, ("device memory, peak of budget", f"{format_nbytes(peak)} of {format_nbytes(budget)}"))
    return table


def _wait_rows(report: TrainReport) -> list[tuple[str, str]]:
    seconds = report.seconds or 1.0
    shares = {lane: report.exposed_s[lane] / seconds for lane in LANES if lane != "compute"}
    waited = [f"{lane} {share:.1%}" for lane, share in shares.items() if share >= 0.0005]
    return [("share of step time waiting on", ", ".join(waited) or "nothing")]
