"""`offload bench kernels`: every kernel on flat buffers beside the machine's stream roof."""

import argparse
from dataclasses import asdict

from ...arguments import add_json, check_writable, count, write_json

HELP = "bandwidth of every kernel and implementation against an in-place stream"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="small arrays, few repetitions: a smoke test")
    parser.add_argument("--threads", type=count(1), help="default: as many as torch uses")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    from .... import kernels
    from ....machine import describe

    check_writable(arguments.json)
    machine = describe()
    for line in machine.lines():
        print(f"# kernels  {line}")
    rows = kernels.run(arguments.quick, arguments.threads)
    write_json(arguments.json, {"machine": machine.as_dict(), "rows": [asdict(row) for row in rows]})
    return 0
