"""`offload store verify DIR`: read every committed byte and compare its checksum."""

import argparse

HELP = "read every committed byte and compare its checksum"
EXIT_DAMAGED = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directories", nargs="+", metavar="DIR", help="of one run or several; one finds its others")


def run(arguments: argparse.Namespace) -> int:
    from offload.store.inspection import by_store, inspect_store, verify_store

    num_damages = 0
    for directories in by_store(arguments.directories):
        damages = verify_store(directories)
        num_damages += len(damages)
        for line in damages:
            print(line)
        found = inspect_store(directories)
        state = f"damaged in {len(damages)} places" if damages else "whole"
        print(f"{found.directories[0]}: step {found.step} is {state}")
    return EXIT_DAMAGED if num_damages else 0
