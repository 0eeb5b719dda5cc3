"""What can be chosen: methods and their parts, as tables for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from wina.allocation import ALLOCATIONS
from wina.corrections import CORRECTIONS, NO_CORRECTION
from wina.criteria import CRITERIA
from wina.methods import METHODS, Method
from wina.refinement import NO_REFINEMENT, REFINEMENTS
from wina.registry import Registry, spelled_out
from wina.rotation import NO_ROTATION, ROTATIONS
from wina.rounding import ROUNDINGS
from wina.selectors import SELECTORS

# Field of SparsityConfig → its known values.
PARTS: dict[str, Registry[Any]] = {
    "criterion": CRITERIA,
    "selector": SELECTORS,
    "allocation": ALLOCATIONS,
    "refinement": REFINEMENTS,
    "correction": CORRECTIONS,
    "rotation": ROTATIONS,
    "rounding": ROUNDINGS,
}
METHOD_COLUMNS = ("method", "what it is", "parts", "computes while calibrating")
PART_COLUMNS = ("value", "with its parameters", "what it is")


def methods() -> list[tuple[str, ...]]:
    """A row for each method: see :data:`METHOD_COLUMNS`."""
    return [
        (name, method.source, ", ".join(_parts(method)), str(method.needs))
        for name, method in ((name, METHODS[name]) for name in METHODS)
    ]


def parts(field: str) -> list[tuple[str, ...]]:
    """A row for each value of a field of :data:`PARTS`: see :data:`PART_COLUMNS`."""
    registry = PARTS[field]
    return [
        (name, spelled_out(registry, name), (registry[name].__doc__ or "").strip().splitlines()[0])
        for name in registry
    ]


def show() -> None:
    """All of it, as tables on stdout."""
    console = Console()
    for title, columns, rows in (
        ("methods", METHOD_COLUMNS, methods()),
        *((field, PART_COLUMNS, parts(field)) for field in PARTS),
    ):
        table = Table(*columns, title=title, title_justify="left", title_style="bold")
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)


def to_document() -> dict[str, Any]:
    """All of it, JSON-ready."""
    return {
        "methods": [dict(zip(METHOD_COLUMNS, row, strict=True)) for row in methods()],
        **{
            field: [dict(zip(PART_COLUMNS, row, strict=True)) for row in parts(field)]
            for field in PARTS
        },
    }


def to_markdown() -> str:
    """All of it, as tables of Markdown."""
    tables = [_markdown(METHOD_COLUMNS, methods())]
    tables += [f"## {field}\n\n{_markdown(PART_COLUMNS, parts(field))}" for field in PARTS]
    return "\n".join(tables)


def _parts(method: Method) -> list[str]:
    if method.dense:
        return []
    named = [f"{criterion} on {role}" for role, criterion in method.criteria.items()]
    usual = (
        (method.correction, NO_CORRECTION),
        (method.refinement, NO_REFINEMENT),
        (method.rotation, NO_ROTATION),
    )
    more = [value for value, none in usual if value != none]
    return [method.criterion, *named, method.allocation, method.selector, *more]


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *([f"`{row[0]}`", *row[1:]] for row in rows)]
    return "\n".join(f"| {' | '.join(map(_escaped, line))} |" for line in lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")
