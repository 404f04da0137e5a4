"""Entry point: finds the commands, parses, and turns what a user can cause into one line."""

import argparse
import importlib
import os
import pkgutil
import re
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from . import commands

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line and name the program, not the sub-command."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USER_ERROR, f"offload: error: {message} (see {self.prog} --help)\n")


def build_parser() -> Parser:
    """The parser with one sub-command per module of `commands`.

    A command is a module with `HELP`, `add_arguments(parser)` and `run(arguments) -> int`; a group of commands is a
    package with `HELP` that holds such modules. Adding a file adds a command. Modules import what is heavy inside `run`
    only, so that --help and errors in flags come at once.
    """
    parser = Parser(prog="offload", description="Train PyTorch models that do not fit in memory, with the same bits.")
    _add_commands(parser, commands)
    return parser


def _add_commands(parser: argparse.ArgumentParser, package: ModuleType) -> None:
    choices = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    for entry in sorted(pkgutil.iter_modules(package.__path__), key=lambda entry: entry.name):
        module = importlib.import_module(f"{package.__name__}.{entry.name}")
        child = choices.add_parser(entry.name.replace("_", "-"), help=module.HELP, description=module.HELP)
        if entry.ispkg:
            _add_commands(child, module)
        else:
            module.add_arguments(child)
            child.set_defaults(run=module.run)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line on `argv` (default: the process's arguments) and return the exit code.

    0 is success, 2 something that the user can mend (one line on stderr), 130 Ctrl-C. A ValueError or OSError is the
    user's to mend everywhere in this project; anything else is our fault and keeps its traceback, and with
    OFFLOAD_TRACEBACK=1 in the environment these two keep theirs as well.
    """
    try:
        arguments = build_parser().parse_args(argv)
        return int(arguments.run(arguments))
    except KeyboardInterrupt:
        print("offload: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else EXIT_USER_ERROR if leaving.code else 0
    except (ValueError, OSError) as problem:
        if os.environ.get("OFFLOAD_TRACEBACK") == "1":
            raise
        print(f"offload: error: {one_line(problem)}", file=sys.stderr)
        return EXIT_USER_ERROR


def one_line(problem: BaseException) -> str:
    """The exception's message with its line breaks made spaces, in the words of the command line; its type if it has
    no message."""
    return _as_flags(" ".join(str(problem).split())) or type(problem).__name__


def _as_flags(text: str) -> str:
    """Python's arguments as the flags of `offload train`."""
    text = re.sub(r"\b(?:OffloadConfig\()?(resume|overwrite)=True\b\)?", r"--\1", text)
    return re.sub(r'\bdurability="(\w+)"', r"--durability \1", text)
