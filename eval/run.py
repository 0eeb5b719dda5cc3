"""From the options of ``wina eval`` to a grid, and to the tables that it prints."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from wina.errors import WinaError
from wina.eval import generation, needle, perplexity_task  # noqa: F401  # they register
from wina.eval.harness import HarnessTask
from wina.eval.local_tasks import LocalTask, local_tasks, write_tasks
from wina.eval.measurement import KINDS, EvalTask


@contextmanager
def open_tasks(names: Sequence[str], data: Path | None) -> Iterator[dict[str, EvalTask]]:
    """Name → task: kinds of our own, local files where ``data`` has them, else lm-eval's own.

    The definitions of local tasks lie in a temporary folder until the ``with`` block ends.
    """
    if not names:
        raise WinaError("no tasks: name some with --tasks, such as piqa,perplexity,needle:1024")
    if repeated := {name for name in names if names.count(name) > 1}:
        raise WinaError(f"task {sorted(repeated)[0]!r} is named twice")
    local = local_tasks() if data is not None else {}
    with tempfile.TemporaryDirectory(prefix="wina-eval-") as folder:
        managers = _Managers([local[name] for name in names if name in local], data, Path(folder))
        tasks: dict[str, EvalTask] = {}
        for name in names:
            kind, _, argument = name.partition(":")
            if kind in KINDS:
                cls: Any = KINDS[kind]
                tasks[name] = cls(argument) if argument else cls()
                continue
            row = local.get(name)
            tasks[name] = HarnessTask(name, managers.of(row), row, data)
        yield tasks


class _Managers:
    """lm-eval's task managers, made when they are needed.

    The one of lm-eval's own tasks reads ten thousand definitions, which takes many seconds.
    """

    def __init__(self, rows: Sequence[LocalTask], data: Path | None, folder: Path) -> None:
        self.rows = rows
        self.data = data
        self.folder = folder
        self.made: dict[bool, Any] = {}

    def of(self, row: LocalTask | None) -> Any:
        """The manager for a row of the local table, or for lm-eval's own tasks."""
        import datasets
        from lm_eval.tasks import TaskManager

        own = row is None
        if own not in self.made:
            logging.getLogger("lm_eval").setLevel(logging.ERROR)
            datasets.disable_progress_bars()
            if own:
                self.made[own] = TaskManager()
            else:
                assert self.data is not None
                write_tasks(self.rows, self.data, self.folder)
                self.made[own] = TaskManager(include_path=str(self.folder), include_defaults=False)
        return self.made[own]


def rows_of(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row a cell: {method, sparsity, task, metric, value, stderr, over_dense, kl, top1,
    realised, documents, seconds}."""
    dense = {c["task"]: c for c in cells if c["sparsity"] == 0.0 and c["method"] == "dense"}
    rows = []
    for cell in cells:
        metric = cell["metrics"][cell["primary"]]
        agreement = cell["agreement"] or {}
        baseline = dense[cell["task"]]["metrics"].get(cell["primary"])
        rows.append(
            {
                "method": cell["method"],
                "sparsity": cell["sparsity"],
                "task": cell["task"],
                "metric": cell["primary"],
                "value": metric["value"],
                "stderr": metric["stderr"],
                "over_dense": metric["value"] - baseline["value"] if baseline else None,
                "kl": agreement.get("kl"),
                "top1": agreement.get("top1"),
                "realised": cell["realised"]["overall"] if cell["realised"] else None,
                "documents": cell["documents"],
                "seconds": cell["seconds"],
            }
        )
    return rows


def print_grid(title: str, rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """A table for people, then the JSON line."""
    table = Table(title=title)
    for column, justify in (
        ("task", "left"), ("metric", "left"), ("method", "left"), ("sparsity", "right"),
        ("realised", "right"), ("value", "right"), ("s.e.", "right"), ("over dense", "right"),
        ("KL", "right"), ("top-1", "right"), ("s", "right"),
    ):  # fmt: skip
        table.add_column(column, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for name in dict.fromkeys(row["task"] for row in rows):
        for row in rows:
            if row["task"] == name:
                table.add_row(*_cells(row))
        table.add_section()
    Console(width=130).print(table)
    print(json.dumps({"rows": list(rows), "folder": str(folder)}))


def _cells(row: Mapping[str, Any]) -> list[str]:
    def shown(value: float | None, digits: str) -> str:
        return "" if value is None else f"{value:{digits}}"

    return [
        row["task"], row["metric"], row["method"], f"{row['sparsity']:.2f}",
        shown(row["realised"], ".3f"), f"{row['value']:.4g}", shown(row["stderr"], ".2g"),
        shown(row["over_dense"], "+.4g"), shown(row["kl"], ".4f"), shown(row["top1"], ".3f"),
        f"{row['seconds']:.1f}",
    ]  # fmt: skip
