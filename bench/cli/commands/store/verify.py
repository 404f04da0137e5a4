"""`offload store verify DIR`: read every committed byte and compare its checksum."""

import argparse

HELP = "read every committed byte and compare its checksum"
EXIT_DAMAGED = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directories", nargs="+", metavar="DIR", help="as given to the engine; one finds the others")


def run(arguments: argparse.Namespace) -> int:
    from offload.store.inspection import inspect_store, verify_store

    damages = verify_store(arguments.directories)
    for line in damages:
        print(line)
    step = inspect_store(arguments.directories).step
    print(f"step {step} is damaged in {len(damages)} places" if damages else f"step {step} is whole")
    return EXIT_DAMAGED if damages else 0
