from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wina.eval.report.svg import Axis, Line, Point, colour_bar, dot_plot, heat_map, line_chart

NUMBERS = st.floats(-1e12, 1e12, allow_subnormal=False)
ERRORS = st.none() | st.floats(0, 1e12)


def check(drawing: str) -> ElementTree.Element:
    """Well-formed, and no number of it is NaN or infinite."""
    assert not re.search(r'[=" ,(](nan|-?inf)[" ,)]', drawing)
    return ElementTree.fromstring(drawing)


@given(NUMBERS, NUMBERS, st.booleans())
def test_axis(a: float, b: float, log: bool) -> None:
    low, high = sorted((a, b))
    axis = Axis(low, high, 10.0, 110.0, log)
    assert 10.0 <= axis.place(low) <= axis.place(high) <= 110.0
    assert 1 <= len(axis.ticks) <= 20
    assert all(9.9 <= axis.place(tick) <= 110.1 for tick in axis.ticks)


@pytest.mark.parametrize(
    ("low", "high", "log", "ticks"),
    [
        (0, 100, False, [0, 25, 50, 75, 100]),
        (1, 1000, True, [1, 10, 100, 1000]),
        (20, 300, True, [20, 50, 100, 200]),
        (30, 34, True, [30, 31, 32, 33, 34]),
    ],
)
def test_ticks_are_round(low: float, high: float, log: bool, ticks: list[float]) -> None:
    assert Axis(low, high, 0, 100, log).ticks == pytest.approx(ticks)


@given(st.lists(st.tuples(NUMBERS, NUMBERS, ERRORS), max_size=6), st.booleans())
def test_line_chart(values: list[tuple[float, float, float | None]], log: bool) -> None:
    points = tuple(Point(x, y, error, "<tip>") for x, y, error in values)
    lines = [Line("a", 0, points), Line("b", 7, points[:1])]
    reference = (values[0][1], values[0][2]) if values else None
    log = log and all(y > 0 for _, y, _ in values)
    drawing = check(line_chart("<title>", lines, "x, %", "y", reference, log=log))
    assert len(drawing.findall(".//{*}path") or drawing.findall(".//path")) >= len(points)


def test_long_headings_are_cut_and_kept_as_tooltip() -> None:
    drawing = line_chart("long " * 30, [], "x", "y")
    assert "…</text>" in drawing
    assert f"<title>{'long ' * 30}</title>" in drawing


def test_heat_map_and_dots() -> None:
    rows = [[(0.5, "half"), None], [(-1.0, "less"), (0.0, "as asked")]]
    drawing = check(heat_map("map", ["q", "a long & odd name"], rows))
    found = [e.get("class") for e in drawing.iter()]
    found = [name for name in found if name in ("less", "more", "absent")]
    assert found == ["more", "absent", "less", "less"]
    check(heat_map("none", [], []))
    check(colour_bar("−1", "0", "+1"))
    check(dot_plot("dots", ["q"], [Line("a", 0, (Point(40.0, 0, None, "t"),))], "x", 40, (40, 40)))
