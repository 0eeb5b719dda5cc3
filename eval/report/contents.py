"""What a report holds: plain records, in shares and nats, as the renderers show them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from wina.eval.report.grid import DENSE, Agreement

BETTER, WORSE, SAME, UNTESTED = "better", "worse", "no difference shown", "not tested"


@dataclass(frozen=True)
class Difference:
    """A value less a reference, and whether chance explains it.

    Attributes:
        value: in the unit of the metric, not turned round for metrics where lower is better.
        stderr: of the difference, documents paired; None if they could not be paired.
        p: two-sided, uncorrected.
        p_holm: corrected over all comparisons of its table.
        test: what gave p.
        documents: pairs it rests on.
        verdict: better, worse, no difference shown, not tested.
    """

    value: float
    stderr: float | None = None
    p: float | None = None
    p_holm: float | None = None
    test: str | None = None
    documents: int | None = None
    verdict: str = UNTESTED


@dataclass(frozen=True)
class Entry:
    """One method at one sparsity on one task; ``value`` is None if the cell is missing."""

    method: str
    sparsity: float
    task: str
    value: float | None = None
    stderr: float | None = None
    difference: Difference | None = None
    recovery: float | None = None
    agreement: Agreement | None = None
    weights_read: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Task:
    """A column of the report.

    Attributes:
        name: the task's.
        kind: lm_eval, perplexity, agreement, needle, generation.
        metric: the primary one.
        higher_is_better: its direction.
        percent: shown times 100 (a share); else as it is.
        averaged: part of the mean over tasks.
        chance: score of guessing; None if unknown.
    """

    name: str
    kind: str
    metric: str
    higher_is_better: bool
    percent: bool
    averaged: bool
    chance: float | None


@dataclass(frozen=True)
class Speed:
    """A row of a decode bench."""

    method: str
    sparsity: float
    engine: str
    dtype: str
    batch: int | None
    context: int | None
    tokens_per_s: float | None
    speedup: float | None
    low: float | None
    high: float | None
    byte_ideal: float | None
    verdict: str | None
    title: str


@dataclass(frozen=True)
class Bench:
    """Where the speeds come from."""

    title: str
    machine: str


@dataclass(frozen=True)
class Row:
    """One method at one sparsity over all tasks.

    Attributes:
        method: its name.
        sparsity: asked for.
        cells: measured, of ``asked``.
        asked: number of tasks.
        averaged: tasks that the mean needs and has.
        mean: over the averaged tasks; None unless all of them are there.
        stderr: of the mean, from the tasks' standard errors.
        difference: of the mean to dense.
        recovery: mean over dense mean.
        above_chance: the same after the score of guessing is taken off both.
        better: tasks significantly better than dense.
        worse: tasks significantly worse than dense.
        weights_read: share of projection weights read, by bytes, mean over tasks.
        kl: mean over tasks, nats per token.
        top1: mean over tasks.
        speed: of a decode bench, if there is one.
    """

    method: str
    sparsity: float
    cells: int
    asked: int
    averaged: int
    mean: float | None = None
    stderr: float | None = None
    difference: Difference | None = None
    recovery: float | None = None
    above_chance: float | None = None
    better: int = 0
    worse: int = 0
    weights_read: float | None = None
    kl: float | None = None
    top1: float | None = None
    speed: Speed | None = None


@dataclass(frozen=True)
class Duel:
    """Two methods at the same sparsity: the first less the second.

    ``better`` and ``worse`` count tasks by p corrected over all duels' tasks, of ``compared``
    tasks that could be tested. ``first_read`` and ``second_read``: share of weights both read.
    """

    first: str
    second: str
    sparsity: float
    tasks: int
    difference: Difference | None
    better: int
    worse: int
    compared: int
    first_read: float | None
    second_read: float | None


@dataclass(frozen=True)
class Realised:
    """Share of weights skipped by each projection: [layer][type], None where there is none.

    ``by_type`` is the mean over layers.
    """

    method: str
    sparsity: float
    types: tuple[str, ...]
    layers: tuple[tuple[float | None, ...], ...]
    by_type: Mapping[str, float]


@dataclass(frozen=True)
class Sample:
    """One prompt at one sparsity: (method, text), dense first if there is one."""

    task: str
    sparsity: float
    prompt: str
    texts: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Report:
    """All that is shown."""

    header: Mapping[str, Any]
    warnings: tuple[str, ...]
    measured: int
    asked: int
    tasks: tuple[Task, ...]
    rows: tuple[Row, ...]
    entries: tuple[Entry, ...]
    duels: tuple[Duel, ...]
    speeds: tuple[Speed, ...]
    benches: tuple[Bench, ...]
    realised: tuple[Realised, ...]
    samples: tuple[Sample, ...]
    metrics: tuple[Mapping[str, Any], ...]

    @property
    def complete(self) -> bool:
        """Whether every cell that was asked for is there."""
        return self.measured == self.asked

    @property
    def averaged(self) -> tuple[str, ...]:
        """Names of the tasks that make up the mean."""
        return tuple(task.name for task in self.tasks if task.averaged)

    @property
    def methods(self) -> tuple[str, ...]:
        """Sparse methods, in order."""
        return tuple(dict.fromkeys(row.method for row in self.rows if row.method != DENSE))

    @property
    def sparsities(self) -> tuple[float, ...]:
        """Asked of the sparse methods, in order."""
        return tuple(dict.fromkeys(row.sparsity for row in self.rows if row.method != DENSE))

    def entries_of(self, row: Row) -> list[Entry]:
        """A row's entries, in the order of the tasks."""
        return [e for e in self.entries if (e.method, e.sparsity) == (row.method, row.sparsity)]
