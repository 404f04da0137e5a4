"""One step as a picture: lanes as rows, one colour per unit, waits in red, the bound beside the measured end.

The picture is laid out once, in pixels from the top left, and drawn twice: as a self-contained HTML page and as a PNG.
"""

from __future__ import annotations

import html
import importlib.util
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from offload.scheduler.chrome import TracedStep, rows_of
from offload.scheduler.trace import LANES, Span, busy_s, moved_nbytes

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 1400, 92, 86, 108, 46
LANE_GAP = 12
ROW_HEIGHTS = {1: 34, 2: 20, 3: 15}  # of a lane with so many rows; 12 with more
RAMP = ((0.0, (70, 82, 196)), (0.4, (34, 160, 160)), (0.7, (124, 186, 74)), (1.0, (242, 178, 60)))
NO_MATPLOTLIB = "needs matplotlib, which is not installed: pip install 'offload[plot]', or write .html"

LIGHT = {
    "ink": "#1c2330", "muted": "#667085", "grid": "#e4e7ec", "band": "#f5f6f8", "wait": "#dc2f35", "bound": "#7a3fd0",
    "other": "#98a2b3", "paper": "#ffffff", "pale": "#ffffff", "dark": "#1c2330",
}  # fmt: skip
DARK = {
    "ink": "#e8ebf0", "muted": "#98a2b3", "grid": "#2b3340", "band": "#1b212b", "wait": "#ff5a5f", "bound": "#b692f6",
    "other": "#667085", "paper": "#12161d", "pale": "#ffffff", "dark": "#1c2330",
}  # fmt: skip


@dataclass(frozen=True)
class Bar:
    """A rectangle; `fill` is a style of `LIGHT` and `DARK`, or a colour."""

    x: float
    y: float
    width: float
    height: float
    fill: str
    opacity: float = 1.0
    title: str = ""


@dataclass(frozen=True)
class Rule:
    """A line in a style."""

    x1: float
    y1: float
    x2: float
    y2: float
    style: str
    dashed: bool = False
    width: float = 1.0


@dataclass(frozen=True)
class Label:
    """Text on the base line y; `anchor` is start, middle or end."""

    x: float
    y: float
    text: str
    style: str = "ink"
    size: int = 12
    anchor: str = "start"
    bold: bool = False


@dataclass(kw_only=True)
class Picture:
    """What is drawn, from back to front. `table` has a row per lane: name, busy seconds, share, bytes."""

    title: str
    width: float = WIDTH
    height: float = 0.0
    shapes: list[Bar | Rule | Label] = field(default_factory=list)
    table: list[tuple[str, ...]] = field(default_factory=list)


def choose(steps: Sequence[TracedStep], number: int | None) -> TracedStep:
    """Step `number`, or the last. Raises: ValueError if it is not in the trace."""
    if not steps:
        raise ValueError("the trace has no step; let the engine make one before the trace ends")
    if number is None:
        return steps[-1]
    for step in steps:
        if step.step == number:
            return step
    raise ValueError(f"the trace has no step {number}; it has {steps[0].step} to {steps[-1].step}")


def draw(steps: Sequence[TracedStep], step: TracedStep) -> Picture:
    """Lay out `step`, with what lasted into it from the steps beside it."""
    return _Drawing(steps, step).picture


class _Drawing:
    """The layout of one step. Times inside are seconds from its start."""

    def __init__(self, steps: Sequence[TracedStep], step: TracedStep) -> None:
        self.step = step
        self.seconds = step.end_s - step.start_s
        near = [other for other in steps if abs(other.step - step.step) <= 1]
        self.spans = [s for other in near for s in other.spans if s.start_s < step.end_s and s.end_s > step.start_s]
        self.waits = [w for other in near for w in other.waits if w.start_s < step.end_s and w.end_s > step.start_s]
        self.scale = (WIDTH - LEFT - RIGHT) / (max(self.seconds, step.bound_s or 0.0) * 1.015)
        self.colours = self._colours()
        self.picture = Picture(title=self._title())
        bottom = self._lanes()
        self._axis(bottom)
        self._ends(bottom)
        self._head()
        self.picture.height = bottom + BOTTOM

    def _title(self) -> str:
        title = f"Step {self.step.step}: {_seconds(self.seconds)}"
        if self.step.bound_s:
            title += f", bound {_seconds(self.step.bound_s)}, ratio {self.seconds / self.step.bound_s:.2f}"
        return title

    def _colours(self) -> dict[str, str]:
        """Unit -> colour along the ramp, in the order in which units first compute."""
        first: dict[str, float] = {}
        for span in self.spans:
            if span.lane == "compute":
                first[span.unit] = min(span.start_s, first.get(span.unit, math.inf))
        units = sorted(first, key=lambda unit: first[unit])
        return {unit: _ramp(index / max(1, len(units) - 1)) for index, unit in enumerate(units)}

    def _x(self, time_s: float) -> float:
        return LEFT + self.scale * min(max(time_s - self.step.start_s, 0.0), self.seconds)

    def _lanes(self) -> float:
        """Draw every lane that did something; returns where the last one ends."""
        y: float = TOP
        busy, moved = busy_s(self._clipped()), moved_nbytes(self.spans)
        for lane in LANES:
            spans = sorted((s for s in self.spans if s.lane == lane), key=lambda span: span.start_s)
            if not spans:
                continue
            rows = rows_of([(span.start_s, span.end_s) for span in spans])
            height = ROW_HEIGHTS.get(max(rows) + 1, 12)
            total = height * (max(rows) + 1)
            self._add(Bar(LEFT, y, self.scale * self.seconds, total, "band"))
            for span, row in zip(spans, rows, strict=True):
                self._span(span, y + row * height, height)
            if lane == "compute":
                self._waits(y, height)
            share = busy[lane] / self.seconds
            self._add(Label(LEFT - 12, y + total / 2 + 4, lane, size=13, anchor="end", bold=True))
            self._add(Label(WIDTH - RIGHT + 12, y + total / 2 + 4, f"{share:.0%} busy", "muted"))
            gb = f"{moved[lane] / 1e9:.3f}" if moved[lane] else ""
            self.picture.table.append((lane, f"{busy[lane]:.3f}", f"{share:.1%}", gb))
            y += total + LANE_GAP
        waited_s = sum(min(w.end_s, self.step.end_s) - max(w.start_s, self.step.start_s) for w in self.waits)
        self.picture.table.append(("waits", f"{waited_s:.3f}", f"{waited_s / self.seconds:.1%}", ""))
        return y - LANE_GAP

    def _clipped(self) -> Iterator[Span]:
        for s in self.spans:
            start_s, end_s = max(s.start_s, self.step.start_s), min(s.end_s, self.step.end_s)
            yield Span(s.lane, start_s, end_s, s.unit, s.kind, s.nbytes, s.queued_s)

    def _span(self, span: Span, y: float, height: float) -> None:
        x, end = self._x(span.start_s), self._x(span.end_s)
        what = f"{span.unit} on {span.lane}" if span.lane == "compute" else f"{span.lane}: {span.kind} of {span.unit}"
        title = f"{what}\n{self._when(span.start_s, span.end_s)}"
        if span.nbytes:
            title += f"\n{span.nbytes / 1e6:.2f} MB, {span.nbytes / 1e9 / (span.end_s - span.start_s):.2f} GB/s"
        if span.lane != "compute":
            title += f"\nqueued for {_seconds(span.start_s - span.queued_s)}"
        opacity = 0.55 if span.kind == "grad" else 1.0
        fill = self.colours.get(span.unit, "other")
        self._add(Bar(x, y + 1, max(0.8, end - x - 0.6), height - 2, fill, opacity, title))
        short = span.unit.rsplit(".", 1)[-1]
        if height >= 15 and end - x > 8 * len(short) + 6:
            style = "ink" if opacity < 1 else _readable_on(fill)
            self._add(Label((x + end) / 2, y + height / 2 + 4, short, style, 11, "middle"))

    def _waits(self, y: float, height: float) -> None:
        for wait in self.waits:
            x, end = self._x(wait.start_s), self._x(wait.end_s)
            title = f"training thread waits for {wait.unit}\n{self._when(wait.start_s, wait.end_s)}"
            self._add(Bar(x, y + 1, max(0.8, end - x), height - 2, "wait", 0.9, title))

    def _when(self, start_s: float, end_s: float) -> str:
        from_s = start_s - self.step.start_s
        return f"{_seconds(end_s - start_s)} from {_seconds(from_s)} to {_seconds(end_s - self.step.start_s)}"

    def _axis(self, bottom: float) -> None:
        tick_s = _tick(self.seconds)
        for index in range(int(self.seconds / tick_s) + 1):
            x = LEFT + self.scale * index * tick_s
            self.picture.shapes.insert(0, Rule(x, TOP - 6, x, bottom + 8, "grid"))
            self._add(Label(x, bottom + 24, _seconds(index * tick_s), "muted", 11, "middle"))

    def _ends(self, bottom: float) -> None:
        """The measured end and, where it is known, the bound."""
        end = LEFT + self.scale * self.seconds
        self._add(Rule(end, TOP - 12, end, bottom + 8, "ink", width=1.4))
        if self.step.bound_s is None:
            self._add(Label(end, TOP - 18, f"end {_seconds(self.seconds)}", anchor="end", bold=True))
            return
        bound = LEFT + self.scale * self.step.bound_s
        self._add(Rule(bound, TOP - 12, bound, bottom + 8, "bound", dashed=True, width=1.8))
        if abs(end - bound) > 170:
            places = ((bound, "middle"), (end, "middle"))
        else:
            places = ((bound - 6, "end"), (end - 6, "start")) if bound <= end else ((bound + 6, "start"), (end, "end"))
        (bound_x, bound_anchor), (end_x, end_anchor) = places
        self._add(Label(bound_x, TOP - 18, f"bound {_seconds(self.step.bound_s)}", "bound", 12, bound_anchor, True))
        self._add(Label(end_x, TOP - 18, f"end {_seconds(self.seconds)}", "ink", 12, end_anchor, True))

    def _head(self) -> None:
        """Title and legend."""
        self._add(Label(LEFT, 32, self.picture.title, size=19, bold=True))
        x = LEFT + self._legend_ramp(LEFT)
        for fill, opacity, text in (("wait", 0.9, "training thread waits"), (_ramp(0.5), 0.55, "gradients")):
            self._add(Bar(x, 50, 22, 12, fill, opacity))
            self._add(Label(x + 29, 60, text, "muted"))
            x += 29 + 7 * len(text) + 20

    def _legend_ramp(self, x: float) -> float:
        names = list(self.colours)
        if not names:
            return 0.0
        cells = 22
        for index in range(cells):
            self._add(Bar(x + index * 6, 50, 5.4, 12, _ramp(index / (cells - 1))))
        text = f"units in the order in which they compute: {names[0]} ... {names[-1]}"
        self._add(Label(x + cells * 6 + 8, 60, text, "muted"))
        return cells * 6 + 8 + 6.2 * len(text) + 24

    def _add(self, shape: Bar | Rule | Label) -> None:
        self.picture.shapes.append(shape)


def _ramp(share: float) -> str:
    """The colour at `share` in [0, 1] of the ramp."""
    for (low, first), (high, last) in itertools.pairwise(RAMP):
        if share <= high:
            part = (share - low) / (high - low)
            return "#" + "".join(f"{round(a + (b - a) * part):02x}" for a, b in zip(first, last, strict=True))
    return "#" + "".join(f"{value:02x}" for value in RAMP[-1][1])


def _readable_on(fill: str) -> str:
    """The style of text that is readable on a colour."""
    if fill in LIGHT:
        return "pale"
    red, green, blue = (int(fill[at : at + 2], 16) for at in (1, 3, 5))
    return "dark" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "pale"


def _tick(seconds: float) -> float:
    """A round distance between marks, so that there are five to twelve."""
    power = 10.0 ** math.floor(math.log10(seconds))
    return next(power * step for step in (0.1, 0.2, 0.5, 1.0) if seconds / (power * step) <= 12)


def _seconds(value: float) -> str:
    """`value` with a unit, three figures: "1.20 s", "35.1 ms", "0"."""
    if abs(value) < 5e-7:
        return "0"
    if abs(value) >= 1:
        return f"{value:.2f} s"
    if abs(value) >= 1e-3:
        return f"{value * 1e3:.3g} ms"
    return f"{value * 1e6:.3g} µs"


# -- HTML


def to_html(picture: Picture) -> str:
    """A page that needs nothing else: drawing, hover titles, and the table below; for light and dark screens."""
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in picture.table)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html.escape(picture.title)}</title>
<style>
:root {{ color-scheme: light dark; {_variables(LIGHT)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK)} }} }}
body {{ margin: 24px auto; max-width: 1480px; padding: 0 16px; background: var(--paper); color: var(--ink);
  font: 14px/1.45 system-ui, sans-serif; }}
svg {{ width: 100%; height: auto; display: block; font-family: system-ui, sans-serif; }}
svg rect.bar:hover {{ stroke: var(--ink); stroke-width: 1.2; }}
table {{ border-collapse: collapse; margin: 20px 0 0 {LEFT}px; }}
th, td {{ padding: 4px 18px 4px 0; text-align: right; border-bottom: 1px solid var(--grid);
  font-variant-numeric: tabular-nums; }}
th {{ color: var(--muted); font-weight: 500; }}
th:first-child, td:first-child {{ text-align: left; }}
</style></head><body>
{to_svg(picture)}
<table><tr><th>lane</th><th>busy s</th><th>of the step</th><th>GB</th></tr>{rows}</table>
</body></html>
"""


def to_svg(picture: Picture) -> str:
    """The drawing alone; its styles are CSS variables."""
    body = "\n".join(_svg(shape) for shape in picture.shapes)
    size = f'viewBox="0 0 {picture.width:.0f} {picture.height:.0f}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">\n{body}\n</svg>'


def _svg(shape: Bar | Rule | Label) -> str:
    if isinstance(shape, Bar):
        place = f'x="{shape.x:.2f}" y="{shape.y:.2f}" width="{shape.width:.2f}" height="{shape.height:.2f}"'
        look = f'rx="1.5" fill="{_css(shape.fill)}"' + (f' fill-opacity="{shape.opacity}"' if shape.opacity < 1 else "")
        if not shape.title:
            return f"<rect {place} {look}/>"
        return f'<rect class="bar" {place} {look}><title>{html.escape(shape.title)}</title></rect>'
    if isinstance(shape, Rule):
        dashes = ' stroke-dasharray="5 4"' if shape.dashed else ""
        return (
            f'<line x1="{shape.x1:.2f}" y1="{shape.y1:.2f}" x2="{shape.x2:.2f}" y2="{shape.y2:.2f}" '
            f'stroke="{_css(shape.style)}" stroke-width="{shape.width}"{dashes}/>'
        )
    weight = ' font-weight="600"' if shape.bold else ""
    return (
        f'<text x="{shape.x:.2f}" y="{shape.y:.2f}" font-size="{shape.size}" fill="{_css(shape.style)}" '
        f'text-anchor="{shape.anchor}"{weight} pointer-events="none">{html.escape(shape.text)}</text>'
    )


def _css(style: str) -> str:
    return f"var(--{style})" if style in LIGHT else style


def _variables(styles: dict[str, str]) -> str:
    return " ".join(f"--{name}: {value};" for name, value in styles.items())


# -- PNG


def write_png(picture: Picture, path: Path, *, dpi: int = 160) -> None:
    """The drawing in its light styles. Needs matplotlib (see `check`)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    points = 72 / 96  # a CSS pixel in points, at any dpi
    figure = Figure(figsize=(picture.width / 96, picture.height / 96), dpi=dpi, facecolor=LIGHT["paper"])
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set(xlim=(0, picture.width), ylim=(picture.height, 0))
    axes.axis("off")
    for order, shape in enumerate(picture.shapes):
        if isinstance(shape, Bar):
            colour = LIGHT.get(shape.fill, shape.fill)
            axes.add_patch(
                Rectangle(
                    (shape.x, shape.y), shape.width, shape.height, facecolor=colour, alpha=shape.opacity, linewidth=0,
                    zorder=order,
                )
            )  # fmt: skip
        elif isinstance(shape, Rule):
            style = (0, (4, 3)) if shape.dashed else "-"
            axes.plot(
                (shape.x1, shape.x2), (shape.y1, shape.y2), color=LIGHT[shape.style], linewidth=shape.width * points,
                linestyle=style, zorder=order,
            )  # fmt: skip
        else:
            anchor = {"start": "left", "middle": "center", "end": "right"}[shape.anchor]
            axes.text(
                shape.x, shape.y, shape.text, color=LIGHT[shape.style], fontsize=shape.size * points, ha=anchor,
                va="baseline", fontweight="bold" if shape.bold else "normal", zorder=order,
            )  # fmt: skip
    figure.savefig(path)


def check(path: Path) -> None:
    """Refuse a file that could not be written, before the work whose picture it is to be.

    Raises: ValueError for a suffix that is no format, a missing folder, or .png without matplotlib.
    """
    if path.suffix not in (".html", ".png"):
        raise ValueError(f"{str(path)!r}: a timeline is written as .html or .png; give such a name")
    if not path.parent.is_dir():
        raise ValueError(f"{str(path)!r}: the folder {str(path.parent)!r} does not exist; make it first")
    if path.suffix == ".png" and importlib.util.find_spec("matplotlib") is None:
        raise ValueError(f"{str(path)!r} {NO_MATPLOTLIB}")


def trace_beside(path: Path) -> Path:
    """Where the trace of a picture lies: step.html -> step.trace.json."""
    return path.with_suffix(".trace.json")


def write(picture: Picture, path: Path) -> None:
    """Write the picture in the format that the suffix of `path` names. Raises: as `check`; OSError."""
    check(path)
    if path.suffix == ".html":
        path.write_text(to_html(picture), encoding="utf-8")
    else:
        write_png(picture, path)
