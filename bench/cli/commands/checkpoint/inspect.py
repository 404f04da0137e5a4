"""`offload checkpoint inspect DIR`: what a checkpoint, or each one in a run's folder, holds."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ...arguments import add_json, check_writable, write_json

if TYPE_CHECKING:
    from offload.checkpoint.folder import Found

HELP = "show what a checkpoint holds, or every one in a run's folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", help="a checkpoint, or the folder that engine.save was given")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from offload.checkpoint.folder import checkpoints_in

    from ....memory import format_nbytes

    check_writable(arguments.json)
    found = checkpoints_in(Path(arguments.directory))
    console = Console(highlight=False)
    table = Table("checkpoint", "step", "saved (UTC)", "bytes", "parameters", "optimizer", "left out", pad_edge=False)
    rows = [_row(one) for one in found]
    for row in rows:
        cells = [row["path"], row["step"], row["saved"], format_nbytes(row["nbytes"]), row["num_parameters"]]
        table.add_row(*map(str, [*cells, row["optimizer"], row["num_left_out"]]))
    console.print(table)
    write_json(arguments.json, {"checkpoints": rows})
    return 0


def _row(one: "Found") -> dict:
    import datetime

    read = one.document
    when = datetime.datetime.fromtimestamp(read.saved_unix_s, datetime.UTC)
    return {
        "path": str(one.path),
        "step": read.step,
        "saved": when.strftime("%Y-%m-%d %H:%M:%S"),
        "nbytes": read.nbytes,
        "num_parameters": len(read.parameters),
        "optimizer": read.optimizer["name"],
        "num_left_out": len(read.left_out),
    }
