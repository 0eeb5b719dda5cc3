"""Charts as inline SVG. Colours are classes, so that the page's style sheet adapts them.

Lengths are in CSS pixels of the chart's own box, which scales to the width of its column.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

# Below this ratio of its ends a logarithmic axis would be all empty decades.
_LOG_RANGE = 1e-12
_MARKERS = (
    "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0z",  # circle
    "M-3.6,-3.6h7.2v7.2h-7.2z",  # square
    "M0,-4.8L4.5,3.4h-9z",  # triangle
    "M0,-5L5,0L0,5L-5,0z",  # diamond
    "M0,4.8L4.5,-3.4h-9z",  # triangle, point down
    "M-4.5,-1.5h3v-3h3v3h3v3h-3v3h-3v-3h-3z",  # cross
)
COLOURS = len(_MARKERS)


@dataclass(frozen=True)
class Point:
    """A measured point; ``error`` is drawn to both sides, ``label`` is its tooltip."""

    x: float
    y: float
    error: float | None
    label: str


@dataclass(frozen=True)
class Line:
    """Points of one method; ``style`` picks marker and colour."""

    name: str
    style: int
    points: tuple[Point, ...]


def tag(name: str, *children: str, **attributes: object) -> str:
    """An element. Attribute values are escaped; children are markup (see :func:`text`)."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_value(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    inner = "".join(children)
    return f"<{name}{written}>{inner}</{name}>" if inner else f"<{name}{written}/>"


def text(words: str, x: float, y: float, **attributes: object) -> str:
    """Escaped text at a place."""
    return tag("text", escape(words), x=x, y=y, **attributes)


def marker(style: int, x: float, y: float, tooltip: str = "") -> str:
    """A filled mark of a method."""
    title = tag("title", escape(tooltip)) if tooltip else ""
    return tag("path", title, d=_MARKERS[style % COLOURS], class_=f"mark c{style % COLOURS}",
               transform=f"translate({_value(x)},{_value(y)})")  # fmt: skip


def swatch(style: int) -> str:
    """A legend's mark."""
    return tag("svg", tag("line", x1=0, x2=26, y1=7, y2=7, class_=f"line c{style % COLOURS}"),
               marker(style, 13, 7), width=26, height=14, viewBox="0 0 26 14",
               aria_hidden="true", class_="swatch")  # fmt: skip


class Axis:
    """A scale from data to pixels with round ticks; logarithmic if asked and sensible."""

    def __init__(
        self, low: float, high: float, start: float, end: float, log: bool = False, ticks: int = 5
    ) -> None:
        self.log = log and low > _LOG_RANGE * high
        if low == high:
            slack = abs(low) * 0.05 or 1.0
            low, high = low - slack, high + slack
        pad = 0.06
        if self.log:
            ratio = (high / low) ** pad
            low, high = low / ratio, high * ratio
        else:
            low, high = low - pad * (high - low), high + pad * (high - low)
        self.low, self.high, self.start, self.end = low, high, start, end
        self.ticks = _log_ticks(low, high) if self.log else _ticks(low, high, ticks)

    def place(self, value: float) -> float:
        """Data → pixel."""
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def line_chart(
    title: str,
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    reference: tuple[float, float | None] | None = None,
    width: float = 400,
    height: float = 270,
    log: bool = False,
) -> str:
    """Lines with error bars.

    Args:
        title: above the chart, and its name for screen readers.
        lines: in the order of their styles.
        x_label: with unit.
        y_label: with unit; it stands under the title, where long names of metrics have room.
        reference: (value, standard error) of a dashed line with its band.
        width: of the box.
        height: of the box.
        log: a logarithmic y axis.
    """
    points = [point for line in lines for point in line.points]
    ys = [p.y + sign * (p.error or 0) for p in points for sign in (-1, 1)]
    if log:
        ys = [y for y in ys if y > 0]
    if reference:
        ys += [reference[0] + sign * (reference[1] or 0) for sign in (-1, 1)]
    top, bottom, right = 48.0, height - 44, width - 14
    y_axis = Axis(min(ys, default=0.0), max(ys, default=1.0), bottom, top, log)
    left = 18 + 6.5 * max(len(_tick(tick)) for tick in y_axis.ticks)
    xs = [p.x for p in points] or [0.0, 100.0]
    x_axis = Axis(min(xs), max(xs), left, right, ticks=6)
    parts = [_frame(title, x_axis, y_axis, x_label, y_label, width, height)]
    if reference:
        level, error = y_axis.place(reference[0]), reference[1] or 0.0
        if error and not (y_axis.log and reference[0] <= error):
            upper = y_axis.place(reference[0] + error)
            parts.append(tag("rect", x=left, y=upper, width=right - left, class_="band",
                             height=y_axis.place(reference[0] - error) - upper))  # fmt: skip
        parts.append(tag("line", x1=left, x2=right, y1=level, y2=level, class_="reference"))
    for line in lines:
        style = line.style % COLOURS
        places = [(x_axis.place(p.x), y_axis.place(p.y), p) for p in line.points]
        path = " ".join(f"{_value(x)},{_value(y)}" for x, y, _ in places)
        parts.append(tag("polyline", points=path, class_=f"line c{style}"))
        for x, _, p in places:
            if p.error and not (y_axis.log and p.y <= p.error):
                ends = [y_axis.place(p.y + sign * p.error) for sign in (-1, 1)]
                parts.append(tag("line", x1=x, x2=x, y1=ends[0], y2=ends[1],
                                 class_=f"error c{style}"))  # fmt: skip
        parts += [marker(style, x, y, p.label) for x, y, p in places]
    return _svg(title, parts, width, height)


def dot_plot(
    title: str,
    names: Sequence[str],
    dots: Sequence[Line],
    x_label: str,
    reference: float,
    limits: tuple[float, float],
    width: float = 320,
) -> str:
    """Rows of dots: ``Point.y`` is the index of its name, ``reference`` a dashed vertical line."""
    left, top, pitch = 62.0, 34.0, 24.0
    right, bottom = width - 12, top + pitch * len(names)
    height = bottom + 44
    axis = Axis(*limits, left, right)
    parts = [_heading(title, 8, 18, width, class_="title")]
    parts += [_vertical(axis, tick, top, bottom) for tick in axis.ticks]
    parts += [
        text(name, left - 8, top + pitch * (i + 0.5) + 4, class_="tick", text_anchor="end")
        for i, name in enumerate(names)
    ]
    parts += [
        tag("line", x1=left, x2=right, y1=top + pitch * i, y2=top + pitch * i, class_="grid")
        for i in range(len(names) + 1)
    ]
    place = axis.place(reference)
    parts.append(tag("line", x1=place, x2=place, y1=top, y2=bottom, class_="reference"))
    for number, line in enumerate(dots):
        shift = (number - (len(dots) - 1) / 2) * min(5.0, 14.0 / max(1, len(dots) - 1))
        parts += [
            marker(line.style, axis.place(p.x), top + pitch * (p.y + 0.5) + shift, p.label)
            for p in line.points
        ]
    parts.append(text(x_label, (left + right) / 2, height - 8, class_="label",
                      text_anchor="middle"))  # fmt: skip
    return _svg(title, parts, width, height)


def heat_map(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[tuple[float, str] | None]]
) -> str:
    """Cells from −1 (class ``less``) to 1 (``more``), each (value, tooltip); rows go downwards."""
    left, top, wide = 38.0, 66.0, 22.0
    high = min(14.0, max(3.0, 260 / max(1, len(rows))))
    width, height = left + wide * len(columns) + 26, top + high * len(rows) + 8
    parts = [
        _heading(title, 8, 18, width, class_="title"),
        text("layer", 6, top - 6, class_="tick"),
    ]
    for i, name in enumerate(columns):
        x = left + wide * (i + 0.5)
        parts.append(text(name, x, top - 5, class_="tick",
                          transform=f"rotate(-45 {_value(x)} {_value(top - 5)})"))  # fmt: skip
    step = max(1, math.ceil(14 / high / 5) * 5) if high < 14 else 1
    for i, row in enumerate(rows):
        y = top + high * i
        if i % step == 0:
            parts.append(text(str(i), left - 5, y + high / 2 + 4, class_="tick", text_anchor="end"))
        for j, cell in enumerate(row):
            place = {"x": left + wide * j, "y": y, "width": wide, "height": high}
            if cell is None:
                parts.append(tag("rect", **place, class_="absent"))
                continue
            value, tooltip = cell
            parts.append(tag("rect", tag("title", escape(tooltip)), **place,
                             class_="more" if value > 0 else "less",
                             fill_opacity=min(1.0, abs(value))))  # fmt: skip
    parts.append(tag("rect", x=left, y=top, width=wide * len(columns), height=high * len(rows),
                     class_="frame"))  # fmt: skip
    return _svg(title, parts, width, height, fixed=True)


def colour_bar(low: str, middle: str, high: str) -> str:
    """The key of a heat map, from full ``less`` over nothing to full ``more``."""
    parts = [
        tag("rect", x=(i + 10) * 16, y=4, width=16, height=14,
            class_="more" if i > 0 else "less", fill_opacity=abs(i) / 10)
        for i in range(-10, 11)
    ]  # fmt: skip
    parts.append(tag("rect", x=0.5, y=4, width=335, height=14, class_="frame"))
    for words, x, anchor in ((low, 0, "start"), (middle, 168, "middle"), (high, 336, "end")):
        parts.append(text(words, x, 33, class_="tick", text_anchor=anchor))
    return _svg("colour scale", parts, 336, 38, fixed=True)


def _frame(
    title: str, x: Axis, y: Axis, x_label: str, y_label: str, width: float, height: float
) -> str:
    parts = [
        _heading(title, 8, 18, width, class_="title"),
        *(_vertical(x, tick, y.end, y.start) for tick in x.ticks),
    ]
    for tick in y.ticks:
        place = y.place(tick)
        parts.append(tag("line", x1=x.start, x2=x.end, y1=place, y2=place, class_="grid"))
        parts.append(text(_tick(tick), x.start - 6, place + 4, class_="tick", text_anchor="end"))
    parts.append(tag("line", x1=x.start, x2=x.end, y1=y.start, y2=y.start, class_="axis"))
    parts.append(text(x_label, (x.start + x.end) / 2, height - 8, class_="label",
                      text_anchor="middle"))  # fmt: skip
    parts.append(_heading(y_label, 8, 35, width, class_="label"))
    return "".join(parts)


def _heading(words: str, x: float, y: float, width: float, **attributes: object) -> str:
    """Text cut to the width of its chart, in full as a tooltip."""
    most = int((width - x) / 7.2)
    if len(words) <= most:
        return text(words, x, y, **attributes)
    cut = escape(words[: most - 1] + "…")
    return tag("text", tag("title", escape(words)), cut, x=x, y=y, **attributes)


def _vertical(axis: Axis, tick: float, top: float, bottom: float) -> str:
    x = axis.place(tick)
    return tag("line", x1=x, x2=x, y1=top, y2=bottom, class_="grid") + text(
        _tick(tick), x, bottom + 16, class_="tick", text_anchor="middle"
    )


def _svg(title: str, parts: Sequence[str], width: float, height: float, fixed: bool = False) -> str:
    size = {"width": width, "height": height} if fixed else {}
    return tag("svg", *parts, viewBox=f"0 0 {_value(width)} {_value(height)}", role="img",
               aria_label=title, class_="chart", **size)  # fmt: skip


def _ticks(low: float, high: float, wanted: int) -> list[float]:
    """Round numbers inside [low, high], about ``wanted`` of them."""
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [step * i for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 of every decade; only decades if there are many; even steps if there are few."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    if len(decades) <= 4:
        ticks = [m * 10.0**d for d in decades for m in (1, 2, 5)]
    else:
        ticks = [10.0**d for d in decades[:: math.ceil(len(decades) / 8)]]
    found = [tick for tick in ticks if low <= tick <= high]
    return found if len(found) >= 3 else _ticks(low, high, 5)


def _tick(value: float) -> str:
    if abs(value) >= 1e6 or 0 < abs(value) < 1e-4:
        return f"{value:.0e}".replace("-", "−")
    return f"{value:.6g}".replace("-", "−")


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return str(value)
