"""From a folder of results to the files of its report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from wina.errors import WinaError
from wina.eval.report import words
from wina.eval.report.contents import Report
from wina.eval.report.grid import load
from wina.eval.report.render import RENDERERS
from wina.eval.report.summary import summarise


@dataclass(frozen=True)
class Written:
    """A report and where its files are, by name."""

    report: Report
    paths: dict[str, Path]


def write_report(folder: Path, output: Path | None = None, benches: Sequence[Path] = ()) -> Written:
    """Write report.html, report.md, report.csv and report.json of a grid, finished or not.

    Args:
        folder: with grid.json and cells/.
        output: where to write; ``folder`` by default.
        benches: runs of ``wina bench decode --output`` besides those in the folder.

    Raises:
        WinaError: there is no grid in the folder, or the files cannot be written.
    """
    report = summarise(load(folder, benches))
    output = output or folder
    paths = {name: output / name for name in RENDERERS}
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, path in paths.items():
            path.write_text(RENDERERS[name](report), encoding="utf-8")
    except OSError as error:
        raise WinaError(f"cannot write the report: {error}") from None
    return Written(report, paths)


def print_written(written: Written) -> None:
    """A table for people, then the JSON line."""
    report = written.report
    table = Table(title=escape(f"{words.model_name(report.header)}: {words.state(report)}"))
    for column in ("method", "weights read, %", "mean, %", "Δ to dense", "recovery, %", "KL"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in report.rows:
        table.add_row(
            escape(words.setting(row.method, row.sparsity)),
            words.percent(row.weights_read),
            f"{words.percent(row.mean)} {words.percent_margin(row.stderr)}".strip(),
            words.difference(row.difference),
            words.percent(row.recovery),
            words.small(row.kl),
        )
    Console(width=100).print(table)
    for warning in report.warnings:
        Console(stderr=True).print(escape(f"note: {warning}"), highlight=False)
    print(
        json.dumps(
            {
                "paths": {
                    path.suffix.removeprefix("."): str(path) for path in written.paths.values()
                },
                "complete": report.complete,
                "cells": report.measured,
                "asked": report.asked,
                "warnings": list(report.warnings),
            }
        )
    )
