"""Progress of long work, on stderr."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Advance(Protocol):
    """Tells that ``steps`` more of the work are done."""

    def __call__(self, steps: int = 1) -> None:
        """Move the bar."""


@contextmanager
def progress(description: str, total: int, show: bool = True) -> Iterator[Advance]:
    """A bar with the time left; plain lines where stderr is no terminal; nothing if not shown."""
    console = Console(stderr=True)
    if not show:
        yield lambda steps=1: None
        return
    if not console.is_terminal:
        console.print(f"{description} ...", highlight=False)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(description, total=total)
        yield lambda steps=1: bar.advance(task, steps)
