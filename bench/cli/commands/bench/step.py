"""`offload bench step`: tokens/s of plain torch, the engine in memory and the engine on NVMe, from one run."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ...arguments import add_json, check_writable, count, memory_size, write_json

if TYPE_CHECKING:
    from ....machine import Machine
    from ....step_table import Row, StepTable

HELP = "tokens/s: plain torch in memory, engine in memory, engine on NVMe"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="base", help="as in offload train (default base)")
    parser.add_argument("--batch", type=count(1), default=8)
    parser.add_argument("--seq", type=count(1), default=256)
    parser.add_argument("--steps", type=count(1), default=2, help="counted steps per process (default 2)")
    parser.add_argument("--warm-up", type=count(0), default=1, help="steps before them (default 1)")
    parser.add_argument("--rounds", type=count(1), default=3, help="processes per case, in turns (default 3)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--host-memory", type=memory_size, default="auto", metavar="SIZE")
    parser.add_argument("--nvme", type=Path, default=Path(), metavar="DIR", help="an existing folder (default: .)")
    parser.add_argument("--durability", default="step", help='"step" (default), "none", or N for every N-th step')
    parser.add_argument("--no-verify", action="store_true", help="do not compare checksums of what is read")
    parser.add_argument("--update", default="auto", help="when units are updated, as in OffloadConfig (default auto)")
    parser.add_argument(
        "--rig", metavar="RIG", help="show each case beside its lower bound on this rig (see offload probe --rig)"
    )
    parser.add_argument("--cases", default="plain,memory,states-nvme,nvme", help="also plain-recompute")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from ....machine import describe
    from ....rigs import find
    from ....step_table import StepTable, measure

    check_writable(arguments.json)
    table = StepTable(
        cases=tuple(case for case in arguments.cases.split(",") if case),
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
        durability=arguments.durability,
        verify=not arguments.no_verify,
        update=arguments.update,
        rig=None if arguments.rig is None else find(arguments.rig),
    )
    progress = Console(stderr=True)
    rows, results = measure(table, lambda line: progress.print(line, markup=False, highlight=False))
    machine = describe(table.nvme)
    for line in lines(table, rows, machine):
        print(line)
    write_json(
        arguments.json,
        {
            "machine": machine.as_dict(),
            "table": asdict(table),
            "rows": [asdict(row) for row in rows],
            "processes": [asdict(result) for result in results],
        },
    )
    return 0


def lines(table: "StepTable", rows: "list[Row]", machine: "Machine") -> list[str]:
    """The table as Markdown, with the machine and the method above it."""
    from ....memory import format_nbytes

    head = [f"# step  {line}" for line in machine.lines()]
    head.append(
        f"# {table.model}, {table.dtype}, batch {table.batch} x {table.seq}; {table.rounds} rounds in turns of "
        f"{table.warm_up} warm-up + {table.steps} timed steps, each case its own process; median [p20, p80]"
    )
    head.append(f"# durability {table.durability}, checksums {'compared' if table.verify else 'not compared'} on read")
    head.append("# the engine keeps activations while activation_memory lasts; expected: with the smallest window")
    head.append(
        "| case | tokens/s | of plain | step s | bound s, ratio, lane | waiting "
        "| NVMe B/param: read, written | expected | peak RSS |"
    )
    head.append("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        low, middle, high = row.step_s
        bound = "" if row.bound_s is None else f"{row.bound_s:.2f}, {row.bound_ratio:.2f}, {row.bound_lane}"
        head.append(
            f"| {row.label} | {row.tokens_per_s:.0f} | {row.relative:.2f} | {middle:.2f} [{low:.2f}, {high:.2f}] "
            f"| {bound} | {row.exposed_share:.1%} | {row.read_per_parameter:.2f}, {row.write_per_parameter:.2f} "
            f"| {row.expected_read:.0f}, {row.expected_write:.0f} | {format_nbytes(row.peak_rss_nbytes)} |"
        )
    return head
