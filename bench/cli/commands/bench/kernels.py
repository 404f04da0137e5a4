"""`offload bench kernels`: every kernel on flat buffers beside the machine's stream roof."""

import argparse
from dataclasses import asdict

from ...arguments import add_json, check_writable, count, write_json

HELP = "bandwidth of every kernel and implementation against an in-place stream"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="small arrays, few repetitions: a smoke test")
    parser.add_argument("--threads", type=count(1), help="default: as many as torch uses")
    parser.add_argument(
        "--device-elements", type=count(1), help="elements of the arrays on a GPU, where there is one; default: 2**28"
    )
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    from .... import device_kernels, kernels
    from ....machine import describe

    check_writable(arguments.json)
    machine = describe()
    for line in machine.lines():
        print(f"# kernels  {line}")
    rows = kernels.run(arguments.quick, arguments.threads)
    losses = []
    device = device_kernels.find()
    if device is not None:
        print(f"# kernels  {device_kernels.describe(device)}")
        rows += device_kernels.run(device, arguments.quick, arguments.device_elements)
        losses = device_kernels.run_losses(device, arguments.quick)
    results = {"rows": [asdict(row) for row in rows], "losses": [asdict(row) for row in losses]}
    write_json(arguments.json, {"machine": machine.as_dict(), **results})
    return 0
