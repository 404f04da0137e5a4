"""`offload bench schedule`: steps on paced rigs beside their lower bound, with and without each feature."""

import argparse
from dataclasses import asdict

from ...arguments import add_json, check_writable, count, write_json

HELP = "steps on paced rigs beside their lower bound, with each feature of the schedule on and off"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--regime", action="append", metavar="NAME", help="repeat for more; default: all of them")
    parser.add_argument("--only-all", action="store_true", help="leave out the rows with a feature switched off")
    parser.add_argument("--steps", type=count(1), default=5, help="counted steps per case (default 5)")
    parser.add_argument("--warm-up", type=count(1), default=2, help="steps before them (default 2)")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from ....machine import describe
    from ....regimes import REGIMES, regime
    from ....schedule_table import AS_IT_IS, FEATURES, head, line, measure_schedule

    check_writable(arguments.json)
    regimes = [regime(name) for name in arguments.regime] if arguments.regime else list(REGIMES)
    progress = Console(stderr=True)
    machine = describe(None)
    for words in machine.lines():
        print(f"# schedule  {words}")
    print(
        f"# paced rigs, one compute thread; {arguments.warm_up} warm-up + {arguments.steps} timed steps; "
        "median [p20, p80]; bound: of the phases where a norm is waited for; waits: seconds a step, by lane"
    )
    print("\n".join(head()), flush=True)
    rows = []
    for row in measure_schedule(
        regimes,
        [AS_IT_IS] if arguments.only_all else FEATURES,
        lambda words: progress.print(words, markup=False, highlight=False),
        steps=arguments.steps,
        warm_up=arguments.warm_up,
    ):
        rows.append(row)
        print(line(row), flush=True)
    write_json(
        arguments.json,
        {
            "machine": machine.as_dict(),
            "rows": [{**asdict(row), "bound_ratio": row.bound_ratio} for row in rows],
        },
    )
    return 0
