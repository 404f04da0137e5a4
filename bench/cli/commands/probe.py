"""`offload probe DIR...`: measure drives, print a table, keep the result beside the store and as JSON."""

import argparse
from dataclasses import asdict
from pathlib import Path

from ..arguments import add_json, check_writable, positive, write_json

HELP = "measure the drives under directories"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directories", nargs="+", metavar="DIR", help="one per drive; made if missing")
    parser.add_argument("--seconds", type=positive, default=4.0, help="how long to measure each (default 4)")
    parser.add_argument(
        "--rig", type=Path, metavar="FILE", help="measure cores and compute too, and write this machine as a rig (TOML)"
    )
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from offload.scheduler.storage import measure_drive
    from offload.store.folder import open_folders
    from offload.store.tuning import save_report

    from ...machine import describe
    from ...memory import format_nbytes

    check_writable(arguments.json)
    check_writable(arguments.rig, "--rig")
    reports = []
    for directory in arguments.directories:
        folders = open_folders([directory], None, make=True)
        try:
            backend = folders.backends[0]
            reports.append(measure_drive(backend, seconds=arguments.seconds, progress=lambda text: None))
            save_report(backend, reports[-1])
        finally:
            folders.release()
    console = Console(highlight=False)
    machine = describe()
    for line in machine.lines():
        console.print(line, markup=False, style="dim", soft_wrap=True)
    table = Table("", *(str(directory) for directory in arguments.directories), pad_edge=False)
    for name, cell in (
        ("file system", lambda report: report.file_system),
        ("direct I/O", lambda report: f"yes, {report.align_nbytes} B aligned" if report.direct else "no"),
        ("free", lambda report: format_nbytes(report.free_nbytes)),
        ("read GB/s", lambda report: f"{report.read_gb_s:.2f}"),
        ("write GB/s", lambda report: f"{report.write_gb_s:.2f}"),
        ("mixed GB/s, both together", lambda report: f"{report.mixed_gb_s:.2f}"),
        ("4 KiB read us", lambda report: f"{report.read_latency_s * 1e6:.0f}"),
        ("flush us", lambda report: f"{report.flush_s * 1e6:.0f}"),
        ("best request", lambda report: f"{format_nbytes(report.chunk_nbytes)}, {report.depth} in flight"),
    ):
        table.add_row(name, *(cell(report) for report in reports))
    console.print(table)
    if arguments.rig is not None:
        from ...measured_rig import measure_rig

        rig = measure_rig(reports)
        rig.write(arguments.rig)
        console.print(rig.to_toml(), markup=False, soft_wrap=True)
        console.print(f"the machine as a rig: {arguments.rig}", markup=False)
    write_json(arguments.json, {"machine": machine.as_dict(), "drives": [asdict(report) for report in reports]})
    return 0
