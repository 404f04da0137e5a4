"""The unit table that `print(engine)` shows."""

from __future__ import annotations

from .assembly import Assembly
from .sizes import format_size


def unit_table(parts: Assembly) -> str:
    """One line per unit: name, parameters, bytes by kind and the tier where each kind rests."""
    rows: list[tuple[str, ...]] = [("unit", "parameters", "param", "states", "grad")]
    for layout, homes in zip(parts.layouts, parts.homes, strict=True):
        cells = []
        for kind in ("param", "states", "grad"):
            nbytes = layout.staged_nbytes if kind == "param" else layout.nbytes(kind)
            cells.append(f"{format_size(nbytes)} {homes[kind].tier}" if nbytes else "-")
        rows.append((layout.unit.name, f"{layout.unit.numel:,}", *cells))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    plan = parts.plan
    lines.append(
        f"host memory: {format_size(plan.rest_nbytes)} at rest, {format_size(plan.ring_nbytes)} ring, "
        f"{format_size(plan.stage_nbytes)} on the way, of {format_size(parts.host_budget_nbytes)}; device: "
        f"{parts.device.name}"
    )
    return "\n".join(lines)
