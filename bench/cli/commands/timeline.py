"""`offload timeline TRACE`: one step of a trace as a picture."""

import argparse
from pathlib import Path

HELP = "draw one step of a trace: lanes, units, waits, and the bound beside the measured end"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "trace",
        type=Path,
        help="what engine.trace(path) wrote, or the .trace.json beside a picture of train --timeline",
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("step.html"), metavar="FILE", help=".html (default step.html) or .png"
    )
    parser.add_argument("--step", type=int, metavar="N", help="number of the step (default: the last)")


def run(arguments: argparse.Namespace) -> int:
    from offload.scheduler.chrome import read_trace

    from ...timeline import choose, draw, write

    steps = read_trace(arguments.trace)
    picture = draw(steps, choose(steps, arguments.step))
    write(picture, arguments.output)
    print(f"{picture.title} -> {arguments.output}")
    return 0
