"""`offload store inspect DIR`: what lives where, which step, how large."""

import argparse
from dataclasses import asdict

from ...arguments import add_json, check_writable, write_json

HELP = "show what a store holds; safe while an engine uses it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directories", nargs="+", metavar="DIR", help="as given to the engine; one finds the others")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from offload.store.inspection import inspect_store

    from ....memory import format_nbytes

    check_writable(arguments.json)
    found = inspect_store(arguments.directories)
    console = Console(highlight=False)
    for index, directory in enumerate(found.directories):
        console.print(f"directory {index}: {directory}", markup=False, soft_wrap=True)
    state = "can be resumed" if found.resumable else f"cannot be resumed: {found.why_not}"
    step = "no step" if found.step is None else f"step {found.step}"
    console.print(f"{step}, durability {found.durability}, {format_nbytes(found.file_nbytes)} on drives, {state}")
    if found.endurance:
        written = format_nbytes(found.endurance["written_nbytes"])
        console.print(f"written so far {written} in {found.endurance['num_commits']} commits")
    table = Table("extent", "kind", "bytes", "pieces", "slot", "directories", pad_edge=False)
    for row in found.rows:
        slot = "-" if row.slot is None else str(row.slot)
        places = " ".join(map(str, row.directories))
        table.add_row(row.key, row.kind, format_nbytes(row.nbytes), str(row.num_pieces), slot, places)
    console.print(table)
    write_json(arguments.json, {**asdict(found), "directories": [str(path) for path in found.directories]})
    return 0
