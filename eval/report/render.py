"""A report as HTML, Markdown, CSV and JSON. The same report gives the same bytes."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from wina.eval.report import pictures, words
from wina.eval.report.contents import Report
from wina.eval.report.differences import segments
from wina.eval.report.grid import DENSE
from wina.eval.report.significance import LEVEL

FORMAT = "wina-eval-report"
VERSION = 1
_FOLDER = Path(__file__).parent

COLUMNS = (
    "method", "sparsity", "task", "kind", "metric", "primary", "higher_is_better", "value",
    "stderr", "difference", "difference_stderr", "p", "p_holm", "test", "documents", "verdict",
    "recovery", "weights_read", "kl", "kl_stderr", "top1", "seconds",
)  # fmt: skip


def to_html(report: Report) -> str:
    """One page that needs no other file and no network."""
    maps, scale = pictures.layer_maps(report)
    drawn = {
        "legend": [(name, Markup(mark)) for name, mark in pictures.legend(report)],
        "overview": _markup(pictures.mean_quality(report), pictures.divergence(report),
                            pictures.speed(report)),
        "tasks": _markup(*pictures.task_panels(report)),
        "types": _markup(*pictures.by_type(report)),
        "maps": [(sparsity, _markup(*drawings)) for sparsity, drawings in maps],
        "scale": Markup(scale),
    }  # fmt: skip
    return (
        _environment()
        .get_template("page.html.jinja")
        .render(
            report=report, pictures=drawn, style=Markup((_FOLDER / "style.css").read_text("utf-8"))
        )
    )


def to_markdown(report: Report) -> str:
    """The tables and the generated texts, for a README or an issue."""
    # Markdown is not HTML: its own escapes are the filters `cell` and `block`
    environment = _environment(autoescape=False)
    return environment.get_template("report.md.jinja").render(report=report)


def to_csv(report: Report) -> str:
    """One line for each metric of each cell; a missing cell is a line without a value.

    Only primary metrics are tested, so the others have no p.
    """
    kinds = {task.name: task.kind for task in report.tasks}
    entries = {(e.method, e.sparsity, e.task): e for e in report.entries}
    lines: list[dict[str, Any]] = [
        {"method": e.method, "sparsity": e.sparsity, "task": e.task, "verdict": "missing"}
        for e in report.entries
        if e.value is None
    ]
    for metric in report.metrics:
        line = {**metric, "kind": kinds[metric["task"]]}
        entry = entries[metric["method"], metric["sparsity"], metric["task"]]
        line |= {"weights_read": entry.weights_read, "seconds": entry.seconds}
        if entry.agreement:
            line |= asdict(entry.agreement)
        if metric["primary"] and entry.difference:
            found = asdict(entry.difference)
            line |= {"difference": found.pop("value"), "difference_stderr": found.pop("stderr"),
                     **found, "recovery": entry.recovery}  # fmt: skip
        lines.append(line)
    order = {key: index for index, key in enumerate(entries)}
    lines.sort(key=lambda row: order[row["method"], row["sparsity"], row["task"]])
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return buffer.getvalue()


def to_json(report: Report) -> str:
    """All numbers of the report; what is not finite becomes null."""
    document = {"format": FORMAT, "version": VERSION, "complete": report.complete}
    return json.dumps({**document, **_finite(asdict(report))}, indent=1, allow_nan=False) + "\n"


RENDERERS: dict[str, Callable[[Report], str]] = {
    "report.html": to_html,
    "report.md": to_markdown,
    "report.csv": to_csv,
    "report.json": to_json,
}
"""File name → what writes it."""


def _environment(autoescape: bool = True) -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=autoescape,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    environment.globals |= {"words": words, "segments": segments, "DENSE": DENSE, "LEVEL": LEVEL}
    environment.filters |= {"cell": _markdown_cell, "block": _markdown_block}
    return environment


def _markup(*drawings: str | None) -> list[Markup]:
    """Drawings that exist; their texts were escaped where they were drawn."""
    return [Markup(drawing) for drawing in drawings if drawing]


def _markdown_cell(value: Any) -> str:
    """Text that stays inside a table cell and is shown as it is."""
    text = " ".join(str(value).split())
    # an underscore inside a word, as in lm_eval, means nothing
    return re.sub(r"[\\`*\[\]<>|#~]|(?<!\w)_|_(?!\w)", r"\\\g<0>", text)


def _markdown_block(value: Any) -> str:
    """Any text as an indented code block, in which nothing has a meaning."""
    return "\n".join(f"    {line}" for line in str(value).splitlines() or [""])


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return value
