"""Every number of the report, computed once from a grid."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from statistics import fmean
from typing import Any

from wina.eval.report.chance import chance
from wina.eval.report.contents import (
    BETTER,
    SAME,
    UNTESTED,
    WORSE,
    Bench,
    Difference,
    Duel,
    Entry,
    Realised,
    Report,
    Row,
    Sample,
    Speed,
    Task,
)
from wina.eval.report.grid import DENSE, Cell, Grid
from wina.eval.report.significance import LEVEL, compare, holm, z_test

# What these measure is a distance to the dense model: nothing is left to compare with it.
_RELATIVE_KINDS = ("agreement", "generation")
# Metrics whose documents are stored under another name.
_ROWS_OF = {"perplexity": "nats"}
_LAYER_DIGITS = 4


def summarise(grid: Grid) -> Report:
    """Compute the report of a grid, finished or not."""
    tasks = tuple(_task(grid, name) for name in grid.tasks)
    entries = _entries(grid, tasks)
    speeds = tuple(_speeds(grid.benches))
    return Report(
        header=grid.header,
        warnings=grid.warnings,
        measured=len(grid.cells),
        asked=len(grid.settings) * len(tasks),
        tasks=tasks,
        rows=_rows(grid, tasks, entries, speeds),
        entries=entries,
        duels=_duels(grid, tasks, entries),
        speeds=speeds,
        benches=tuple(_bench(run) for run in grid.benches),
        realised=tuple(_realised(grid)),
        samples=tuple(_samples(grid)),
        metrics=tuple(_metrics(grid)),
    )


def _task(grid: Grid, name: str) -> Task:
    cells = [cell for cell in grid.cells.values() if cell.task == name]
    if not cells:
        return Task(name, "", "", True, False, False, None)
    first = next((cell for cell in cells if cell.method == DENSE), cells[0])
    share = first.metric.higher_is_better and all(
        0 <= cell.metrics[first.primary].value <= 1
        for cell in cells
        if first.primary in cell.metrics
    )
    return Task(
        name, first.kind, first.primary, first.metric.higher_is_better, share,
        share and first.kind == "lm_eval", chance(name),
    )  # fmt: skip


def _compare(task: Task, cell: Cell, other: Cell) -> Difference:
    """A cell less another one of the same task, not yet corrected."""
    metric, reference = cell.metrics[task.metric], other.metrics[task.metric]
    name = task.metric if task.metric in cell.rows else _ROWS_OF.get(task.metric, "")
    rows, others = cell.rows.get(name, ()), other.rows.get(name, ())
    paired = compare(rows, others, metric.value, reference.value)
    difference = Difference(metric.value - reference.value)
    if paired is None:
        return difference
    return replace(
        difference, stderr=paired.stderr, p=paired.p, test=paired.test, documents=paired.documents
    )


def _judge(
    differences: Sequence[Difference | None], upward: Sequence[bool]
) -> list[Difference | None]:
    """Correct a table's comparisons and say what each shows."""
    corrected = holm([None if d is None else d.p for d in differences])
    judged: list[Difference | None] = []
    for difference, p, up in zip(differences, corrected, upward, strict=True):
        if difference is None or p is None:
            judged.append(difference)
            continue
        verdict = SAME
        if p < LEVEL:
            verdict = BETTER if (difference.value > 0) == up else WORSE
        judged.append(replace(difference, p_holm=p, verdict=verdict))
    return judged


def _entries(grid: Grid, tasks: Sequence[Task]) -> tuple[Entry, ...]:
    entries = [_entry(grid, task, *setting) for setting in grid.settings for task in tasks]
    directions = {task.name: task.higher_is_better for task in tasks}
    judged = _judge([e.difference for e in entries], [directions[e.task] for e in entries])
    return tuple(replace(e, difference=d) for e, d in zip(entries, judged, strict=True))


def _entry(grid: Grid, task: Task, method: str, sparsity: float) -> Entry:
    cell = grid.cells.get((method, sparsity, task.name))
    if cell is None or task.metric not in cell.metrics:
        return Entry(method, sparsity, task.name)
    metric = cell.metrics[task.metric]
    entry = Entry(
        method, sparsity, task.name, metric.value, metric.stderr,
        agreement=cell.agreement,
        weights_read=_weights_read(cell),
        seconds=cell.seconds,
    )  # fmt: skip
    dense = grid.cells.get((DENSE, 0.0, task.name))
    if method == DENSE or dense is None or task.metric not in dense.metrics:
        return entry
    if task.kind in _RELATIVE_KINDS:
        return entry
    reference = dense.metrics[task.metric].value
    return replace(
        entry,
        difference=_compare(task, cell, dense),
        recovery=metric.value / reference if task.percent and reference else None,
    )


def _rows(
    grid: Grid, tasks: Sequence[Task], entries: Sequence[Entry], speeds: Sequence[Speed]
) -> tuple[Row, ...]:
    averaged = [task for task in tasks if task.averaged]
    names = {task.name for task in averaged}
    found = []
    for setting in grid.settings:
        mine = [e for e in entries if (e.method, e.sparsity) == setting and e.value is not None]
        scores = [e for e in mine if e.task in names]
        verdicts = [e.difference.verdict for e in mine if e.difference]
        row = Row(
            *setting,
            cells=len(mine),
            asked=len(tasks),
            averaged=len(scores),
            better=verdicts.count(BETTER),
            worse=verdicts.count(WORSE),
            weights_read=_mean(e.weights_read for e in mine),
            kl=_mean(e.agreement.kl for e in mine if e.agreement),
            top1=_mean(e.agreement.top1 for e in mine if e.agreement),
            speed=_speed(speeds, *setting),
        )
        if scores and len(scores) == len(averaged):
            row = replace(row, mean=_mean(e.value for e in scores),
                          stderr=_stderr_of_mean([e.stderr for e in scores]))  # fmt: skip
        found.append(row)
    return _against_dense(found, averaged, entries)


def _against_dense(
    rows: Sequence[Row], averaged: Sequence[Task], entries: Sequence[Entry]
) -> tuple[Row, ...]:
    """Add what the means are relative to dense."""
    dense = next((row.mean for row in rows if row.method == DENSE), None)
    levels = [task.chance for task in averaged]
    floor = None if None in levels else _mean(levels)
    related = []
    for row in rows:
        if dense is None or row.mean is None or row.method == DENSE:
            related.append(row)
            continue
        differences = [
            e.difference
            for task in averaged
            for e in entries
            if (e.method, e.sparsity, e.task) == (row.method, row.sparsity, task.name)
        ]
        above = None
        if floor is not None and dense > floor:
            above = (row.mean - floor) / (dense - floor)
        related.append(
            replace(row, difference=_mean_difference(differences),
                    recovery=row.mean / dense if dense else None, above_chance=above)
        )  # fmt: skip
    judged = _judge([row.difference for row in related], [True] * len(related))
    return tuple(replace(row, difference=d) for row, d in zip(related, judged, strict=True))


def _mean_difference(differences: Sequence[Difference | None]) -> Difference | None:
    """Mean of the differences on several tasks; a z test if every task has a standard error."""
    known = [d for d in differences if d is not None]
    if not known or len(known) != len(differences):
        return None
    mean = sum(d.value for d in known) / len(known)
    stderr = _stderr_of_mean([d.stderr for d in known])
    if stderr is None:
        return Difference(mean)
    documents = sum(d.documents or 0 for d in known)
    return Difference(mean, stderr, z_test(mean, stderr), test="z", documents=documents)


def _duels(grid: Grid, tasks: Sequence[Task], entries: Sequence[Entry]) -> tuple[Duel, ...]:
    """Every two sparse methods at every sparsity."""
    methods = list(dict.fromkeys(m for m, _ in grid.settings if m != DENSE))
    sparsities = list(dict.fromkeys(s for m, s in grid.settings if m != DENSE))
    pairs = [(a, b, s) for s in sparsities for a, b in combinations(methods, 2)]
    found: list[tuple[tuple[str, str, float], Task, Difference]] = []
    for a, b, sparsity in pairs:
        for task in tasks:
            one, two = (grid.cells.get((m, sparsity, task.name)) for m in (a, b))
            if one and two and task.metric in one.metrics and task.metric in two.metrics:
                found.append(((a, b, sparsity), task, _compare(task, one, two)))
    verdicts = _judge([d for _, _, d in found], [task.higher_is_better for _, task, _ in found])
    averaged = sum(task.averaged for task in tasks)
    duels = []
    for pair in pairs:
        mine = [d.verdict for (p, _, _), d in zip(found, verdicts, strict=True) if p == pair and d]
        means = [d for p, task, d in found if p == pair and task.averaged]
        mean = _mean_difference(means) if means and len(means) == averaged else None
        if mine:
            compared = len(mine) - mine.count(UNTESTED)
            reads = [
                _mean(e.weights_read for e in entries if (e.method, e.sparsity) == (m, pair[2]))
                for m in pair[:2]
            ]
            duels.append(
                Duel(
                    *pair, len(mine), mean, mine.count(BETTER), mine.count(WORSE), compared, *reads
                )
            )
    judged = _judge([duel.difference for duel in duels], [True] * len(duels))
    return tuple(replace(duel, difference=d) for duel, d in zip(duels, judged, strict=True))


def _speeds(benches: Iterable[Mapping[str, Any]]) -> Iterable[Speed]:
    for run in benches:
        for row in run.get("rows", ()):
            method = str(row.get("method"))
            yield Speed(
                method=method,
                sparsity=0.0 if method == DENSE else float(row.get("sparsity") or 0.0),
                engine=str(row.get("engine", "")),
                dtype=str(row.get("dtype", "")),
                batch=row.get("batch"),
                context=row.get("context"),
                tokens_per_s=row.get("tokens_per_s"),
                speedup=row.get("speedup_vs_dense"),
                low=row.get("low"),
                high=row.get("high"),
                byte_ideal=row.get("byte_ideal"),
                verdict=row.get("verdict"),
                title=str(run.get("title") or ""),
            )


def _bench(run: Mapping[str, Any]) -> Bench:
    machine = run.get("machine") or {}
    words = [
        machine.get("gpu") or machine.get("cpu"),
        f"{machine['threads']} threads" if machine.get("threads") else None,
        f"commit {machine['commit']}" if machine.get("commit") else None,
    ]
    return Bench(str(run.get("title") or ""), ", ".join(str(word) for word in words if word))


def _speed(speeds: Sequence[Speed], method: str, sparsity: float) -> Speed | None:
    """The row shown beside the quality: the first of the smallest batch and context."""
    mine = [s for s in speeds if (s.method, s.sparsity) == (method, sparsity)]
    return min(mine, key=lambda s: (s.batch or 1, s.context or 0), default=None)


def _realised(grid: Grid) -> Iterable[Realised]:
    """Mean over the tasks of what each projection skipped; experts of a layer are averaged."""
    for method, sparsity in grid.settings:
        shares: dict[tuple[int, str], list[float]] = {}
        for task in grid.tasks:
            cell = grid.cells.get((method, sparsity, task))
            for name, share in (cell.projections if cell else {}).items():
                *parts, kind = name.split(".")
                # A longer number is none of a layer, and a table of so many layers would be large.
                numbers = (int(p) for p in parts if p.isdecimal() and len(p) <= _LAYER_DIGITS)
                layer = next(numbers, None)
                if layer is not None:
                    shares.setdefault((layer, kind), []).append(share)
        if method == DENSE or not shares:
            continue
        types = tuple(dict.fromkeys(kind for _, kind in shares))
        layers = range(max(layer for layer, _ in shares) + 1)
        means = {key: fmean(values) for key, values in shares.items()}
        yield Realised(
            method,
            sparsity,
            types,
            tuple(tuple(means.get((i, t)) for t in types) for i in layers),
            {t: fmean(v for (_, kind), v in means.items() if kind == t) for t in types},
        )


def _samples(grid: Grid) -> Iterable[Sample]:
    methods = list(dict.fromkeys(m for m, _ in grid.settings if m != DENSE))
    sparsities = list(dict.fromkeys(s for m, s in grid.settings if m != DENSE)) or [0.0]
    for task in grid.tasks:
        dense = grid.cells.get((DENSE, 0.0, task))
        for sparsity in sparsities:
            cells = [(DENSE, dense), *((m, grid.cells.get((m, sparsity, task))) for m in methods)]
            texts: dict[str, list[tuple[str, str]]] = {}
            for method, cell in cells:
                for prompt, text in cell.samples if cell else ():
                    texts.setdefault(prompt, []).append((method, text))
            for prompt, answers in texts.items():
                yield Sample(task, sparsity, prompt, tuple(answers))


def _metrics(grid: Grid) -> Iterable[dict[str, Any]]:
    """Every metric of every cell, the primary ones and the others."""
    for method, sparsity in grid.settings:
        for task in grid.tasks:
            cell = grid.cells.get((method, sparsity, task))
            if cell is None:
                continue
            for name, metric in sorted(cell.metrics.items()):
                yield {
                    "method": method, "sparsity": sparsity, "task": task, "metric": name,
                    "value": metric.value, "stderr": metric.stderr,
                    "higher_is_better": metric.higher_is_better, "primary": name == cell.primary,
                }  # fmt: skip


def _weights_read(cell: Cell) -> float | None:
    if cell.method == DENSE:
        return 1.0
    return None if cell.realised is None else 1 - cell.realised


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _stderr_of_mean(stderrs: Sequence[float | None]) -> float | None:
    """Of the mean of independent values; None if one of them is unknown."""
    known = [value for value in stderrs if value is not None]
    if not known or len(known) != len(stderrs):
        return None
    return math.hypot(*known) / len(known)
