"""Trains every architecture of the zoo and writes the table between the two marks in docs/models.md.

.venv/bin/python tests/offload/zoo/table.py
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
DOCUMENT = HERE.parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- table: tests/offload/zoo/table.py -->", "<!-- end of table -->"


class Collector:
    """A pytest plugin that keeps what each test found."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, Any]] = defaultdict(dict)
        self.architectures: dict[str, Any] = {}
        self.has_failed = False

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        for item in items:
            self.architectures.update(item.module.ARCHITECTURES if hasattr(item.module, "ARCHITECTURES") else {})

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.has_failed |= report.failed
        for key, value in report.user_properties if report.when == "call" else ():
            if key == "found":
                test, _, rest = report.nodeid.partition("::")[2].partition("[")
                device, _, name = rest.removesuffix("]").partition("-")
                if test == "test_with_whole_blocks_as_units":
                    device, name = "blocks", rest.removesuffix("]")
                self.found[name][device] = value


def result(found: Any) -> str:
    """One cell: bits equal, or how far the first gradients are."""
    return "bits equal" if found.first_bits else f"{found.first:.0e}"


def table(collector: Collector) -> str:
    lines = [
        "| architecture | family | units | whole blocks | units, smallest | smallest | on a fake device | weights |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, one in collector.architectures.items():
        found = collector.found[name]
        worst = max(each.weights for each in found.values())
        cells = [name, one.family, found["blocks"].num_units, result(found["blocks"]), found["cpu"].num_units]
        cells += [result(found["cpu"]), result(found["fake"]), f"{worst:.0e}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    notes = [f"- {name}: {one.reason}." for name, one in collector.architectures.items() if one.reason]
    return "\n".join([*lines, "", "Where whole blocks have not torch's bits:", "", *notes])


def main() -> int:
    collector = Collector()
    arguments = [str(HERE / "test_zoo.py"), "-q", "-p", "no:cacheprovider", "--import-mode=importlib", *sys.argv[1:]]
    status = pytest.main(arguments, plugins=[collector])
    if status or collector.has_failed:
        return int(status) or 1
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCUMENT.write_text(f"{before}{BEGIN}\n{table(collector)}\n{END}{after}")
    return 0


if __name__ == "__main__":
    sys.path = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
    sys.exit(main())
