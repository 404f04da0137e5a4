"""`offload bench durability`: the price of commits and checksums in step time, from one run."""

import argparse
from dataclasses import asdict
from pathlib import Path

from ...arguments import add_json, check_writable, count, memory_size, write_json

HELP = 'step time with durability "step", every 10, "none", checksums on and off'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="small", help="as in offload train (default small)")
    parser.add_argument("--batch", type=count(1), default=4)
    parser.add_argument("--seq", type=count(1), default=256)
    parser.add_argument("--steps", type=count(1), default=10, help="counted steps per process (default 10)")
    parser.add_argument("--warm-up", type=count(0), default=2, help="steps before them (default 2)")
    parser.add_argument("--rounds", type=count(1), default=2, help="processes per setting, in turns (default 2)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--host-memory", type=memory_size, default="auto", metavar="SIZE")
    parser.add_argument("--nvme", type=Path, default=Path(), metavar="DIR", help="an existing folder (default: .)")
    parser.add_argument("--case", choices=("nvme", "states-nvme"), default="nvme", help="placement (default nvme)")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from ....durability_table import measure_durability
    from ....machine import describe
    from ....step_table import StepTable

    check_writable(arguments.json)
    table = StepTable(
        cases=(arguments.case,),
        model=arguments.model,
        batch=arguments.batch,
        seq=arguments.seq,
        rounds=arguments.rounds,
        warm_up=arguments.warm_up,
        steps=arguments.steps,
        dtype=arguments.dtype,
        device=arguments.device,
        nvme=arguments.nvme,
        host_memory=arguments.host_memory,
    )
    progress = Console(stderr=True)
    rows = measure_durability(table, lambda line: progress.print(line, markup=False, highlight=False))
    machine = describe(table.nvme)
    for line in machine.lines():
        print(f"# durability  {line}")
    print(
        f"# {table.model}, {table.dtype}, batch {table.batch} x {table.seq}, {arguments.case}; {table.rounds} rounds "
        f"in turns of {table.warm_up} warm-up + {table.steps} timed steps, each its own process; median [p20, p80]"
    )
    print("| durability | checksums compared | step s | relative | hashing, CPU s / step s | written B/param |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        low, middle, high = row.step_s
        print(
            f"| {row.durability} | {'yes' if row.verify else 'no'} | {middle:.3f} [{low:.3f}, {high:.3f}] "
            f"| {row.relative:.3f} | {row.hash_share:.1%} | {row.written_per_parameter:.2f} |"
        )
    write_json(
        arguments.json,
        {"machine": machine.as_dict(), "table": asdict(table), "rows": [asdict(row) for row in rows]},
    )
    return 0
