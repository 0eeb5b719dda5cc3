"""The report's pictures: which numbers go into which chart."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from wina.eval.report import svg, words
from wina.eval.report.contents import Entry, Realised, Report, Row, Task
from wina.eval.report.grid import DENSE

_READ = "projection weights read, % of bytes"
_ASKED = "input channels kept (asked), %"
# A linear axis hides the small values beside ones that are this many times as large.
_LOG_FROM = 5.0


def legend(report: Report) -> list[tuple[str, str]]:
    """(method, swatch) of the sparse methods; a method has one mark in all pictures."""
    return [(name, svg.swatch(style)) for name, style in _styles(report).items()]


def mean_quality(report: Report) -> str | None:
    """Mean over tasks against bytes read; None without such a mean."""
    chart, x_label = _x(report)
    return _chart(
        report,
        "Mean over tasks",
        lambda row: _shown(row, chart(row), row.mean, row.stderr, True),
        x_label,
        "mean score, %",
        _dense_mean(report),
    )


def divergence(report: Report) -> str | None:
    """Mean KL against bytes read; None if it was not measured."""
    chart, x_label = _x(report)
    return _chart(
        report,
        "Distance to the dense model's predictions",
        lambda row: None if row.kl is None else _shown(row, chart(row), row.kl, None, False),
        x_label,
        "KL(dense ‖ sparse), nats/token",
        None,
        spread=True,
    )


def speed(report: Report) -> str | None:
    """Mean over tasks against decode speed; None without a bench."""
    return _chart(
        report,
        "Mean over tasks and decode speed",
        lambda row: (
            _shown(row, row.speed.tokens_per_s, row.mean, row.stderr, True) if row.speed else None
        ),
        "decoded tokens/s",
        "mean score, %",
        _dense_mean(report),
    )


def task_panels(report: Report) -> list[str]:
    """Every task's primary metric against bytes read."""
    chart, x_label = _x(report)
    panels = []
    for task in report.tasks:
        cells = {(e.method, e.sparsity): e for e in report.entries if e.task == task.name}
        dense = cells.get((DENSE, 0.0))

        def point(
            row: Row, cells: dict[tuple[str, float], Entry] = cells, task: Task = task
        ) -> svg.Point | None:
            cell = cells[row.method, row.sparsity]
            return _shown(row, chart(row), cell.value, cell.stderr, task.percent)

        panel = _chart(
            report,
            task.name,
            point,
            x_label,
            f"{task.metric}{', %' if task.percent else ''}"
            f" ({'higher' if task.higher_is_better else 'lower'} is better)",
            None if dense is None else _reference(dense.value, dense.stderr, task.percent),
            spread=not task.higher_is_better,
        )
        if panel:
            panels.append(panel)
    return panels


def by_type(report: Report) -> list[str]:
    """Realised sparsity by projection type, one panel for each sparsity asked."""
    styles = _styles(report)
    types = list(dict.fromkeys(name for found in report.realised for name in found.types))
    panels = []
    for sparsity in report.sparsities:
        dots = []
        for found in report.realised:
            if found.sparsity != sparsity:
                continue
            points = tuple(
                svg.Point(100 * v, types.index(name), None,
                          f"{found.method}, {name}: {words.percent(v)}% skipped")
                for name, v in found.by_type.items()
            )  # fmt: skip
            dots.append(svg.Line(found.method, styles[found.method], points))
        if dots:
            limits = [100 * sparsity, *(p.x for line in dots for p in line.points)]
            panels.append(
                svg.dot_plot(f"Asked: {words.share(sparsity)}", [_short(name) for name in types],
                             dots, "weights skipped, %", 100 * sparsity,
                             (min(limits), max(limits)))
            )  # fmt: skip
    return panels


def layer_maps(report: Report) -> tuple[list[tuple[float, list[str]]], str]:
    """Maps of realised less asked sparsity by sparsity asked, and their common colour scale."""
    limit = _largest_deviation(report.realised)
    maps = []
    for sparsity in report.sparsities:
        mine = [_map(found, limit) for found in report.realised if found.sparsity == sparsity]
        if mine:
            maps.append((sparsity, mine))
    points = words.percent(limit)
    return maps, svg.colour_bar(f"−{points} points", "as asked", f"+{points} points")


def _map(found: Realised, limit: float) -> str:
    def cell(layer: int, name: str, share: float | None) -> tuple[float, str] | None:
        if share is None:
            return None
        tooltip = f"layer {layer}, {name}: {words.percent(share)}% skipped"
        return (share - found.sparsity) / limit, tooltip

    rows = [
        [cell(i, name, share) for name, share in zip(found.types, layer, strict=True)]
        for i, layer in enumerate(found.layers)
    ]
    return svg.heat_map(words.setting(found.method, found.sparsity),
                        [_short(name) for name in found.types], rows)  # fmt: skip


def _largest_deviation(realised: tuple[Realised, ...]) -> float:
    deviations = [
        abs(share - found.sparsity)
        for found in realised
        for layer in found.layers
        for share in layer
        if share is not None
    ]
    return max(deviations, default=0.0) or 1.0


def _chart(
    report: Report,
    title: str,
    point: Callable[[Row], svg.Point | None],
    x_label: str,
    y_label: str,
    reference: tuple[float, float | None] | None,
    spread: bool = False,
) -> str | None:
    """A line for each method through the points that exist; None if there are none.

    ``spread``: the y axis may be logarithmic, for what grows without bound as quality falls.
    """
    lines = list(_lines(report, point))
    if not lines:
        return None
    ys = [p.y for line in lines for p in line.points] + ([reference[0]] if reference else [])
    log = spread and min(ys) > 0 and max(ys) > _LOG_FROM * min(ys)
    return svg.line_chart(title, lines, x_label, f"{y_label}{', log scale' if log else ''}",
                          reference, log=log)  # fmt: skip


def _lines(report: Report, point: Callable[[Row], svg.Point | None]) -> Iterator[svg.Line]:
    for method, style in _styles(report).items():
        points = [p for row in report.rows if row.method == method and (p := point(row))]
        if points:
            yield svg.Line(method, style, tuple(sorted(points, key=lambda p: p.x)))


def _shown(
    row: Row, x: float | None, y: float | None, error: float | None, percent: bool
) -> svg.Point | None:
    """A point with its tooltip; None if a coordinate is missing or infinite."""
    if x is None or y is None or not math.isfinite(y):
        return None
    value = f"{words.percent(y)}{words.percent_margin(error)}%" if percent else words.plain(y)
    label = f"{words.setting(row.method, row.sparsity)}: {value} at {words.plain(x)}"
    factor = 100 if percent else 1
    return svg.Point(x, factor * y, None if error is None else factor * error, label)


def _dense_mean(report: Report) -> tuple[float, float | None] | None:
    return next(
        (_reference(r.mean, r.stderr, True) for r in report.rows if r.method == DENSE), None
    )


def _reference(
    value: float | None, stderr: float | None, percent: bool
) -> tuple[float, float | None] | None:
    if value is None or not math.isfinite(value):
        return None
    factor = 100 if percent else 1
    return factor * value, None if stderr is None else factor * stderr


def _x(report: Report) -> tuple[Callable[[Row], float | None], str]:
    """Bytes read where they were measured anywhere; else what was asked, and labelled so."""
    if any(row.weights_read is not None for row in report.rows if row.method != DENSE):
        return lambda row: None if row.weights_read is None else 100 * row.weights_read, _READ
    return lambda row: 100 * (1 - row.sparsity), _ASKED


def _styles(report: Report) -> dict[str, int]:
    return {method: style for style, method in enumerate(report.methods)}


def _short(name: str) -> str:
    return name.removesuffix("_proj")
