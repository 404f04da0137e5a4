"""`offload store gc DIR`: list what a dead run left behind; delete it only when told."""

import argparse

HELP = "list what a dead run left behind, delete it with --delete"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directories", nargs="+", metavar="DIR", help="as given to the engine")
    parser.add_argument("--delete", action="store_true", help="delete exactly what is listed")
    parser.add_argument("--resumable-too", action="store_true", help="list stores that can still be resumed as well")


def run(arguments: argparse.Namespace) -> int:
    from offload.store.inspection import delete_garbage, list_garbage

    from ....memory import format_nbytes

    found = [list_garbage(path, resumable_too=arguments.resumable_too) for path in arguments.directories]
    for garbage in found:
        print(f"{garbage.root}: {garbage.why}")
        for name in garbage.names:
            print(f"  {garbage.root / name}")
    total = format_nbytes(sum(garbage.nbytes for garbage in found))
    num_files = sum(len(garbage.names) for garbage in found)
    if not arguments.delete:
        print(f"{num_files} files, {total}; nothing was deleted" + (", add --delete to do so" if num_files else ""))
        return 0
    for garbage in found:
        delete_garbage(garbage)
    print(f"deleted {num_files} files, {total}")
    return 0
