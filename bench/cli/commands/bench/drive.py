"""`offload bench drive DIR`: the store beside fio on one directory."""

import argparse
from dataclasses import asdict
from pathlib import Path

from ...arguments import add_json, check_writable, count, positive, write_json

HELP = "the store's bandwidth beside fio's on the same directory"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--mib", type=count(256), default=1024, help="size of the test file (default 1024)")
    parser.add_argument("--seconds", type=positive, default=0.5, help="of each measurement (default 0.5)")
    parser.add_argument("--rounds", type=count(1), default=5, help="turns of the store and fio's best (default 5)")
    parser.add_argument(
        "--case", action="append", metavar="NAME", help='one row only, e.g. "random 4 KiB"; may be repeated'
    )
    parser.add_argument("--no-verify", action="store_true", help="read without comparing checksums")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from ....drive import CASES, compare
    from ....machine import describe

    check_writable(arguments.json)
    unknown = [name for name in arguments.case or () if name not in CASES]
    if unknown:
        raise ValueError(f"--case {unknown[0]!r} is not one of: {', '.join(CASES)}")
    console = Console(highlight=False)
    arguments.directory.mkdir(parents=True, exist_ok=True)
    machine = describe(arguments.directory)
    cases = compare(
        arguments.directory, nbytes=arguments.mib << 20, seconds=arguments.seconds, rounds=arguments.rounds,
        verify=not arguments.no_verify, cases=arguments.case or tuple(CASES),
        progress=lambda text: console.print(text, style="dim", markup=False),
    )  # fmt: skip
    for line in machine.lines():
        console.print(line, markup=False, style="dim", soft_wrap=True)
    table = Table("case", "store GB/s", "[min, max]", "fio GB/s", "[min, max]", "ratio", "target", "fio's best")
    for case in cases:
        spreads = [rf"\[{low:.2f}, {high:.2f}]" for low, high in (case.store_spread, case.fio_spread)]
        table.add_row(
            case.name, f"{case.store_gb_s:.2f}", spreads[0], f"{case.fio_gb_s:.2f}", spreads[1], f"{case.ratio:.2f}",
            f"{case.target:.2f}", case.fio_best,
        )  # fmt: skip
    console.print(table)
    rows = [{**asdict(case), "ratio": case.ratio} for case in cases]
    write_json(arguments.json, {"machine": machine.as_dict(), "verify": not arguments.no_verify, "cases": rows})
    return 0
