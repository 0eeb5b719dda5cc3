"""Every criterion × rotation × allocation × selector, and what each part is worth.

A cell is a cell of a grid (:mod:`wina.eval.grid`); this module names the columns and reads them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from wina.config import parse_settings
from wina.errors import WinaError
from wina.files import write_atomically

CRITERIA = ("magnitude", "norm-power:0.5", "l2-norm", "l1-norm")
ROTATIONS = ("none", "orthogonal")
ALLOCATIONS = ("uniform", "greedy", "fisher")
SELECTORS = ("threshold", "relative", "topk")
# The settings that vary, in the order in which columns follow each other: a rotation is made once.
FACTORS = ("rotation", "criterion", "allocation", "selector")


@dataclass(frozen=True)
class Levels:
    """The values that each setting takes."""

    criterion: Sequence[str] = CRITERIA
    rotation: Sequence[str] = ROTATIONS
    allocation: Sequence[str] = ALLOCATIONS
    selector: Sequence[str] = SELECTORS

    def labels(self) -> list[str]:
        """The columns of a grid: one method, all its settings spelled out."""
        return [
            "/".join(["wina", *(f"{f}={v}" for f, v in zip(FACTORS, values, strict=True))])
            for values in product(*(getattr(self, factor) for factor in FACTORS))
        ]


def levels_of(label: str) -> dict[str, Any]:
    """Factor → value of a column."""
    return parse_settings(label.split("/")[1:])


def rows_of_ablation(
    cells: Iterable[Mapping[str, Any]], projection_bytes: float
) -> list[dict[str, Any]]:
    """One row for each combination and sparsity, means over the texts.

    Args:
        cells: of ``perplexity`` tasks, the dense ones among them.
        projection_bytes: bytes of all projections' weights, to which extra bytes are compared.

    Returns:
        Rows of {criterion, rotation, allocation, selector, sparsity, realised, extra, read,
        nats_over_dense, by_text}: ``extra`` is the rotation's share of projection bytes, ``read``
        what a token reads of them in all.
    """
    found = list(cells)
    dense = {c["task"]: c["metrics"]["nats"]["value"] for c in found if c["method"] == "dense"}
    columns: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
    for cell in found:
        if cell["method"] != "dense":
            columns.setdefault((cell["method"], cell["sparsity"]), []).append(cell)
    rows = []
    for (label, sparsity), group in columns.items():
        losses = {
            cell["task"]: cell["metrics"]["nats"]["value"] - dense[cell["task"]] for cell in group
        }
        realised = fmean(cell["realised"]["overall"] for cell in group)
        extra = group[0]["extra_bytes"] / projection_bytes
        rows.append(
            {
                **levels_of(label),
                "sparsity": sparsity,
                "realised": realised,
                "extra": extra,
                "read": 1.0 - realised + extra,
                "nats_over_dense": fmean(losses.values()),
                "by_text": losses,
            }
        )
    return rows


def effects(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What a setting is worth: its loss over that of the factor's first value, all else equal.

    Returns:
        Rows of {factor, value, sparsity, ratio, better, pairs}: ``ratio`` is the geometric mean of
        nats over dense, relative to the first value of the factor, ``better`` the share of pairs
        with a smaller loss.
    """
    found = []
    for factor in FACTORS:
        values = list(dict.fromkeys(row[factor] for row in rows))
        rest = [name for name in (*FACTORS, "sparsity") if name != factor]

        def place(row: Mapping[str, Any], names: Sequence[str] = rest) -> tuple[Any, ...]:
            return tuple(row[name] for name in names)

        base = {place(row): row for row in rows if row[factor] == values[0]}
        for value in values[1:]:
            for sparsity in _sparsities(rows):
                pairs = [
                    (row["nats_over_dense"], base[place(row)]["nats_over_dense"])
                    for row in rows
                    if row[factor] == value and row["sparsity"] == sparsity and place(row) in base
                ]
                positive = [(new, old) for new, old in pairs if new > 0 and old > 0]
                if not positive:
                    continue
                logs = [math.log(new / old) for new, old in positive]
                found.append(
                    {
                        "factor": factor,
                        "value": f"{value} over {values[0]}",
                        "sparsity": sparsity,
                        "ratio": math.exp(fmean(logs)),
                        "better": fmean(new < old for new, old in pairs),
                        "pairs": len(pairs),
                    }
                )
    return found


def write_ablation(folder: Path, title: str, rows: Sequence[dict[str, Any]]) -> dict[str, Path]:
    """``ablation.json``, ``ablation.md`` and ``ablation.png`` in a folder.

    Returns:
        Name → path of what was written.
    """
    if not rows:
        raise WinaError("no sparse cells: there is nothing to compare")
    worth = effects(rows)
    paths = {name: folder / name for name in ("ablation.json", "ablation.md", "ablation.png")}
    document = {"title": title, "rows": list(rows), "effects": worth}
    write_atomically(paths["ablation.json"], (json.dumps(document, indent=1) + "\n").encode())
    write_atomically(paths["ablation.md"], _markdown(title, rows, worth).encode())
    draw_ablation(title, rows, paths["ablation.png"])
    return paths


def _sparsities(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    return sorted({row["sparsity"] for row in rows})


def _combinations(
    rows: Sequence[Mapping[str, Any]],
) -> list[tuple[Mapping[str, Any], dict[float, Mapping[str, Any]]]]:
    """(settings, sparsity → row) of each combination, least mean loss first."""
    grouped: dict[tuple[str, ...], dict[float, Mapping[str, Any]]] = {}
    for row in rows:
        grouped.setdefault(tuple(row[f] for f in FACTORS), {})[row["sparsity"]] = row
    pairs = [(next(iter(at.values())), at) for at in grouped.values()]
    return sorted(pairs, key=lambda pair: fmean(row["nats_over_dense"] for row in pair[1].values()))


def _markdown(
    title: str, rows: Sequence[Mapping[str, Any]], worth: Sequence[Mapping[str, Any]]
) -> str:
    sparsities = _sparsities(rows)
    shown = [f"{s:.0%}" for s in sparsities]
    lines = [
        f"# {title}",
        "",
        "Nats over dense, means over the texts; *read*: share of projection bytes that a token "
        "reads, rotations included, at the last sparsity.",
        "",
        f"| {' | '.join(FACTORS)} | " + " | ".join(shown) + f" | read at {shown[-1]} |",
        "|" + " --- |" * (len(FACTORS) + len(shown) + 1),
    ]
    for settings, at in _combinations(rows):
        cells = [settings[factor] for factor in FACTORS]
        cells += [f"{at[s]['nats_over_dense']:.4f}" if s in at else "" for s in sparsities]
        cells.append(f"{at[sparsities[-1]]['read']:.3f}" if sparsities[-1] in at else "")
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "What a setting is worth, all else equal: geometric mean of the ratio of nats over dense "
        "(below 1 is better), and the share of pairs in which it is better.",
        "",
        "| factor | value | sparsity | ratio | better | pairs |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {e['factor']} | {e['value']} | {e['sparsity']:.0%} | {e['ratio']:.3f} "
        f"| {e['better']:.0%} | {e['pairs']} |"
        for e in worth
    ]
    return "\n".join(lines) + "\n"


def print_ablation(title: str, rows: Sequence[dict[str, Any]], paths: Mapping[str, Path]) -> None:
    """A table for people, then the JSON line."""
    sparsities = _sparsities(rows)
    table = Table(title=f"{title}: nats over dense, means over the texts")
    for factor in FACTORS:
        table.add_column(factor, no_wrap=True)
    for sparsity in sparsities:
        table.add_column(f"{sparsity:.0%}", justify="right")
    table.add_column(f"read at {sparsities[-1]:.0%}", justify="right")
    for settings, at in _combinations(rows):
        last = at.get(sparsities[-1])
        table.add_row(
            *(settings[factor] for factor in FACTORS),
            *(f"{at[s]['nats_over_dense']:.4f}" if s in at else "" for s in sparsities),
            f"{last['read']:.3f}" if last else "",
        )
    console = Console(width=110)
    console.print(table)
    worth = Table(title="all else equal: ratio of nats over dense")
    for name in ("factor", "value", "sparsity", "ratio", "better"):
        worth.add_column(name, justify="left" if name in ("factor", "value") else "right")
    for effect in effects(rows):
        worth.add_row(
            effect["factor"], effect["value"], f"{effect['sparsity']:.0%}",
            f"{effect['ratio']:.3f}", f"{effect['better']:.0%} of {effect['pairs']}",
        )  # fmt: skip
    console.print(worth)
    files = {name: str(path) for name, path in paths.items()}
    print(json.dumps({"rows": list(rows), "effects": effects(rows), "files": files}))


def draw_ablation(title: str, rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Loss against bytes read: a panel for each allocation and selector."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    allocations = list(dict.fromkeys(row["allocation"] for row in rows))
    selectors = list(dict.fromkeys(row["selector"] for row in rows))
    criteria = list(dict.fromkeys(row["criterion"] for row in rows))
    rotations = list(dict.fromkeys(row["rotation"] for row in rows))
    figure, axes = plt.subplots(
        len(allocations), len(selectors), squeeze=False, sharex=True, sharey=True,
        figsize=(1.5 + 3.2 * len(selectors), 1 + 2.6 * len(allocations)), layout="constrained",
    )  # fmt: skip
    for (i, allocation), (j, selector) in product(enumerate(allocations), enumerate(selectors)):
        panel = axes[i][j]
        panel.set_title(f"{allocation}, {selector}", fontsize=9)
        for (c, criterion), (r, rotation) in product(enumerate(criteria), enumerate(rotations)):
            wanted = (rotation, criterion, allocation, selector)
            points = sorted(
                (100 * row["read"], row["nats_over_dense"])
                for row in rows
                if tuple(row[f] for f in FACTORS) == wanted and row["nats_over_dense"] > 0
            )
            label = criterion if rotation == "none" else f"{criterion}, {rotation}"
            panel.plot(
                [x for x, _ in points], [y for _, y in points], marker="o" if r == 0 else "s",
                markersize=3, linestyle="-" if r == 0 else "--", color=f"C{c}", label=label,
            )  # fmt: skip
        panel.set_yscale("log")
        panel.grid(alpha=0.3)
        if i == len(allocations) - 1:
            panel.set_xlabel("projection bytes read, %", fontsize=8)
        if j == 0:
            panel.set_ylabel("nats over dense", fontsize=8)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)
