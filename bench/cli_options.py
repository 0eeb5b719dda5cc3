"""What the commands of ``wina bench`` share: options, and how a run ends."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wina.cli_options import names
from wina.errors import WinaError

if TYPE_CHECKING:
    from rich.table import Table

    from wina.bench.timing import Effort

Output = Annotated[Path | None, typer.Option(help="JSON file to save the run to.")]
Compare = Annotated[Path | None, typer.Option(help="Saved run to compare with.")]
Against = Annotated[
    str | None, typer.Option(help="Git ref to measure with the same arguments and compare with.")
]

# Options that make no sense while another git ref is measured.
HERE_ONLY = ("--output", "--compare", "--against", "--picture")
Picture = Annotated[Path | None, typer.Option(help="PNG to draw.")]
Quick = Annotated[bool, typer.Option(help="Show that it runs, in seconds; no claim is made.")]
Model = Annotated[str | None, typer.Option("--model", "-m", help="Folder, hub id or `demo`.")]
Shape = Annotated[str | None, typer.Option(help="Random weights at a named shape: llama-3.2-1b, …")]
Rounds = Annotated[int | None, typer.Option(help="Interleaved rounds.")]


def check_subject(model: str | None, shape: str | None) -> None:
    """Raise :class:`WinaError` unless one of the two is named."""
    if (model is None) == (shape is None):
        raise WinaError("pass either --model or --shape")


def integers(values: str) -> list[int]:
    """Split at commas and read as whole numbers."""
    try:
        return [int(value) for value in names(values)]
    except ValueError as error:
        raise WinaError(f"expected whole numbers separated by commas: {error}") from None


def effort_of(quick: bool, rounds: int | None) -> Effort:
    """How much work the options ask for."""
    from wina.bench.timing import FULL, QUICK

    effort = QUICK if quick else FULL
    if rounds is None:
        return effort
    if rounds < 1:
        raise WinaError(f"rounds are counted from 1, not {rounds}")
    return replace(effort, rounds=rounds)


def measured(
    bench: str, title: str, rows: list[dict[str, Any]], arguments: Mapping[str, Any],
    warnings: list[str], effort: Effort, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """A run as a document, which says with what effort it was measured."""
    from wina.bench.runs import document

    settings = {**arguments, "rounds": effort.rounds, "quick": not effort.claims}
    return document(bench, title, rows, settings, warnings, **more)


def finish(
    run: dict[str, Any], picture: Path | None, output: Path | None, compare: Path | None,
    against: str | None = None, tables: Sequence[Table] = (),
) -> None:  # fmt: skip
    """Draw, show, compare and save a run."""
    from wina.bench.plot import draw
    from wina.bench.tables import publish

    if picture is not None:
        draw([run], picture)
    publish(run, tables, output, compare, against, without_options(sys.argv[1:], HERE_ONLY))


def without_options(arguments: Sequence[str], options: Sequence[str]) -> list[str]:
    """A command line without some options and their values."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if skip:
            skip = False
        elif name in options:
            skip = not equals
        else:
            kept.append(argument)
    return kept
