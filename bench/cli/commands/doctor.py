"""`offload doctor [DIR...]`: what runs here, at which speed, and what is missing."""

import argparse
from dataclasses import asdict
from pathlib import Path

from ..arguments import add_json, check_writable, write_json

HELP = "what this machine offers, which kernels run, and why not the fast ones"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "directories", nargs="*", type=Path, metavar="DIR", help="for the store: is direct I/O possible"
    )
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    from ...doctor import examine

    check_writable(arguments.json)
    findings = examine(arguments.directories)
    for finding in findings:
        print(f"[{'+' if not finding.advice else '-'}] {finding.name}: {finding.value}")
        if finding.advice:
            print(f"    {finding.advice}")
    write_json(arguments.json, {"findings": [asdict(finding) for finding in findings]})
    return 0 if all(finding.usable for finding in findings) else 2
