"""A step's picture holds every lane, unit and wait, the bound beside the end, and needs nothing but itself."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from offload.bench.cli import main
from offload.bench.timeline import Bar, Label, Rule, choose, draw, to_html, to_svg, write
from offload.scheduler.chrome import ChromeTrace, TracedStep, read_trace
from offload.scheduler.trace import Span, Wait


def step(number: int, start_s: float, bound_s: float | None = 0.8) -> TracedStep:
    return TracedStep(
        step=number,
        start_s=start_s,
        end_s=start_s + 1.0,
        bound_s=bound_s,
        spans=[
            Span("compute", start_s + 0.1, start_s + 0.4, "blocks.0", "call", 0, start_s + 0.1),
            Span("compute", start_s + 0.5, start_s + 0.9, "blocks.<1>", "call", 0, start_s + 0.5),
            Span("read", start_s, start_s + 0.2, "blocks.0", "states", 2_000_000, start_s),
            Span("read", start_s + 0.1, start_s + 0.5, "blocks.<1>", "states", 2_000_000, start_s),
            Span("d2h", start_s + 0.9, start_s + 1.0, "blocks.0", "grad", 1000, start_s + 0.9),
            Span("write", start_s - 0.1, start_s + 0.1, "blocks.<1>", "states", 1000, start_s - 0.2),
        ],
        waits=[Wait(start_s + 0.4, start_s + 0.5, "blocks.<1>")],
    )


STEPS = [step(3, 10.0), step(4, 11.0)]


def test_the_last_step_is_drawn_unless_another_is_asked_for() -> None:
    assert choose(STEPS, None).step == 4 and choose(STEPS, 3).step == 3
    with pytest.raises(ValueError, match="no step 9; it has 3 to 4"):
        choose(STEPS, 9)
    with pytest.raises(ValueError, match="no step; let the engine"):
        choose([], None)


def test_bars_are_in_proportion_to_time() -> None:
    picture = draw(STEPS, STEPS[1])
    bars = {bar.title.split("\n")[0]: bar for bar in picture.shapes if isinstance(bar, Bar) and bar.title}
    first, second = bars["blocks.0 on compute"], bars["blocks.<1> on compute"]
    per_s = (second.x - first.x) / 0.4
    assert first.width == pytest.approx(0.3 * per_s, abs=1) and second.width == pytest.approx(0.4 * per_s, abs=1)
    assert bars["training thread waits for blocks.<1>"].fill == "wait"
    assert bars["training thread waits for blocks.<1>"].x == pytest.approx(first.x + 0.3 * per_s, abs=0.01)
    assert first.fill != second.fill and first.fill == bars["read: states of blocks.0"].fill
    assert bars["read: states of blocks.0"].y != bars["read: states of blocks.<1>"].y, "they overlap"
    assert bars["d2h: grad of blocks.0"].opacity < 1
    (bound,) = (rule for rule in picture.shapes if isinstance(rule, Rule) and rule.style == "bound")
    (end,) = (rule for rule in picture.shapes if isinstance(rule, Rule) and rule.style == "ink")
    assert end.x1 - bound.x1 == pytest.approx(0.2 * per_s, abs=0.01)
    assert picture.title == "Step 4: 1.00 s, bound 800 ms, ratio 1.25"
    assert all(bar.x >= 0 and bar.x + bar.width <= picture.width for bar in bars.values())


def test_what_lasts_into_the_step_from_its_neighbours_is_drawn_up_to_its_edges() -> None:
    picture = draw(STEPS, STEPS[0])
    writes = [s for s in picture.shapes if isinstance(s, Bar) and s.title.startswith("write: ")]
    assert len(writes) == 2, "its own, begun before it, and the one of the step after it"
    busy = {row[0]: row[1] for row in picture.table}
    assert busy["write"] == "0.200" and busy["compute"] == "0.700" and busy["waits"] == "0.100"
    labels = [shape.text for shape in picture.shapes if isinstance(shape, Label)]
    assert "70% busy" in labels and {"compute", "read", "write", "d2h"} <= set(labels) and "h2d" not in labels


def test_without_a_bound_only_the_end_is_marked() -> None:
    alone = step(1, 0.0, bound_s=None)
    picture = draw([alone], alone)
    assert not [s for s in picture.shapes if isinstance(s, Rule) and s.style == "bound"]
    assert picture.title == "Step 1: 1.00 s"


def test_the_page_is_whole_and_escaped() -> None:
    picture = draw(STEPS, STEPS[1])
    root = ElementTree.fromstring(to_svg(picture))
    titles = [title.text or "" for title in root.iter("{http://www.w3.org/2000/svg}title")]
    assert any("blocks.<1>" in title and "queued for" in title and "2.00 MB" in title for title in titles)
    page = to_html(picture)
    assert "prefers-color-scheme: dark" in page and "<1>" not in page
    links = [link for link in re.findall(r"https?://[^\"' >]+", page) if link != "http://www.w3.org/2000/svg"]
    assert not links and "<script" not in page and "<link" not in page
    used = set(re.findall(r"var\(--(\w+)\)", page))
    assert all(page.count(f"--{name}:") == 2 for name in used), "every style is there for light and for dark"


def test_png_needs_matplotlib_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"step.png' needs matplotlib.*pip install 'offload\[plot\]'"):
        write(draw(STEPS, STEPS[1]), tmp_path / "step.png")


def test_png_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write(draw(STEPS, STEPS[1]), tmp_path / "step.png")
    assert (tmp_path / "step.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = ChromeTrace(tmp_path / "t.json")
    for one in STEPS:
        trace.add(one)
    trace.close()
    out = tmp_path / "step.html"
    assert main(["timeline", str(tmp_path / "t.json"), "-o", str(out), "--step", "3"]) == 0
    assert "Step 3: 1.00 s" in capsys.readouterr().out and "<svg" in out.read_text()
    assert main(["timeline", str(tmp_path / "t.json"), "-o", str(tmp_path / "step.gif")]) == 2
    assert "written as .html or .png" in capsys.readouterr().err
    assert main(["timeline", str(tmp_path / "missing.json")]) == 2
    assert main(["timeline", str(tmp_path / "t.json"), "-o", str(tmp_path / "nowhere" / "step.html")]) == 2
    assert "does not exist; make it first" in capsys.readouterr().err


def test_training_ends_with_a_picture_of_its_last_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["train", "--model", "tiny", "--steps", "2", "--batch", "1", "--seq", "16", "--host-memory", "64MiB"]
    run += ["--device", "cpu", "--quiet", "--eval-batches", "1", "--sample-bytes", "0", "--timeline"]
    assert main([*run, str(tmp_path / "step.html")]) == 0
    assert f"the last step as a picture: {tmp_path / 'step.html'}" in capsys.readouterr().out
    page = (tmp_path / "step.html").read_text()
    assert "Step 2: " in page and "embed" in page
    assert [one.step for one in read_trace(tmp_path / "step.trace.json")] == [1, 2]
    assert main([*run, str(tmp_path / "step.gif")]) == 2
    assert "written as .html or .png" in capsys.readouterr().err
