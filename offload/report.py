"""The memory report, and the unit table that `print(engine)` shows."""

from __future__ import annotations

from .activations import ActivationBudget
from .assembly import Assembly
from .info import MemoryReport
from .sizes import format_size
from .usage import CallLedger


def memory_report(
    parts: Assembly, ledger: CallLedger, activations: ActivationBudget, private_nbytes: int
) -> MemoryReport:
    """Bytes under the budgets, and what lies outside of them."""
    host = [pool.statistics() for pool in (parts.rest, parts.ring, parts.stage)]
    device = [] if parts.device.one_memory else [pool.statistics() for pool in (parts.slots, parts.device_ring.pool)]
    return MemoryReport(
        host_budget_nbytes=parts.host_budget_nbytes,
        host_used_nbytes=sum(one.leased_nbytes + one.warm_nbytes for one in host),
        host_peak_nbytes=sum(one.peak_nbytes for one in host),
        device_budget_nbytes=parts.plan.device_nbytes + parts.plan.device_ring_nbytes,
        device_used_nbytes=sum(one.leased_nbytes + one.warm_nbytes for one in device),
        device_peak_nbytes=sum(one.peak_nbytes for one in device),
        boundaries_peak_nbytes=ledger.boundaries_peak_nbytes,
        activations_peak_nbytes=activations.peak_nbytes,
        temporaries_nbytes=ledger.temporaries_nbytes,
        private_nbytes=private_nbytes,
    )


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
    lines.append(f"threads: {parts.config.plan_threads()}")
    return "\n".join(lines)
