"""`offload checkpoint verify DIR`: read every byte of a checkpoint and compare its checksum."""

import argparse
from pathlib import Path

HELP = "read every byte and compare its checksum"
EXIT_DAMAGED = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directories", nargs="+", metavar="DIR", help="checkpoints, or folders of runs")


def run(arguments: argparse.Namespace) -> int:
    from offload.checkpoint.folder import paths_in
    from offload.checkpoint.verification import verify

    num_damages = 0
    for directory in arguments.directories:
        for path in paths_in(Path(directory)):
            damages = verify(path)
            num_damages += len(damages)
            for line in damages:
                print(line)
            print(f"{path}: {f'damaged in {len(damages)} places' if damages else 'whole'}")
    return EXIT_DAMAGED if num_damages else 0
