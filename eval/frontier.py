"""Quality against the bytes that a token reads: which width, sparsity and method to take."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from wina.config import SparsityConfig
from wina.errors import WinaError
from wina.eval.columns import Column, columns_of
from wina.eval.costs import TokenCosts
from wina.files import write_atomically
from wina.kernels.quantization import WEIGHT_DTYPES

LOADED = "loaded"


def frontier_columns(
    methods: Sequence[str],
    widths: Sequence[str],
    sparsities: Sequence[float],
    common: Mapping[str, Any],
) -> list[Column]:
    """The columns of a grid: every width without sparsity, and every method with it.

    Args:
        methods: each with settings of its own where wanted.
        widths: ``"loaded"`` or keys of :data:`WEIGHT_DTYPES`.
        sparsities: above 0.
        common: settings that all share.
    """
    for width in widths:
        if width != LOADED and width not in WEIGHT_DTYPES:
            known = ", ".join((LOADED, *WEIGHT_DTYPES))
            raise WinaError(f"unknown width {width!r}. Known: {known}.")
    columns = columns_of((), (), common)
    for width in widths:
        own = "" if width == LOADED else f"/weight_dtype={width}"
        if own:
            columns += columns_of([f"teal{own}"], [0.0], common)[1:]
        labels = [f"{method}{own}" for method in methods]
        columns += columns_of(labels, [s for s in sparsities if s > 0.0], common)[1:]
    return columns


def rows_of_frontier(cells: Iterable[Mapping[str, Any]], costs: TokenCosts) -> list[dict[str, Any]]:
    """One row for each method, width and sparsity, means over the texts.

    Returns:
        Rows of {method, width, sparsity, realised, bits, bytes, share, nats_over_dense, best}:
        ``bits`` are those read of a projection's weight in the mean, ``bytes`` those of a token,
        ``share`` is theirs of the dense model's as loaded, ``best`` tells rows that no other row
        beats in both.
    """
    found = list(cells)
    dense = {c["task"]: c["metrics"]["nats"]["value"] for c in found if c["method"] == "dense"}
    columns: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
    for cell in found:
        columns.setdefault((cell["method"], cell["sparsity"]), []).append(cell)
    rows: list[dict[str, Any]] = []
    for (label, sparsity), group in columns.items():
        losses = [cell["metrics"]["nats"]["value"] - dense[cell["task"]] for cell in group]
        method, width = _split(label)
        realised = _mean_realised(group) if sparsity else {}
        config = _config_of(group[0])
        read = costs.at(realised, config, group[0].get("extra_bytes", 0))
        rows.append(
            {
                "method": method if sparsity else "dense",
                "width": width,
                "sparsity": sparsity,
                "realised": costs.mean(realised, config) if realised else 0.0,
                "bits": read.bits,
                "bytes": read.total,
                "share": costs.share(read),
                "nats_over_dense": fmean(losses),
            }
        )
    rows.sort(key=lambda row: (row["bytes"], row["nats_over_dense"]))
    least = float("inf")
    for row in rows:
        row["best"] = row["nats_over_dense"] < least
        least = min(least, row["nats_over_dense"])
    return rows


def _split(label: str) -> tuple[str, str]:
    """(method with its other settings, width) of a column."""
    parts = label.split("/")
    widths = [p.removeprefix("weight_dtype=") for p in parts if p.startswith("weight_dtype=")]
    method = "/".join(part for part in parts if not part.startswith("weight_dtype="))
    return method, widths[0] if widths else LOADED


def _config_of(cell: Mapping[str, Any]) -> SparsityConfig | None:
    """The settings of a cell's column, None for the dense model."""
    config = cell["identity"].get("config")
    return None if config is None else SparsityConfig.from_dict(config)


def _mean_realised(group: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Projection → share skipped, mean over the texts."""
    shares = [cell["realised"]["projections"] for cell in group]
    return {name: fmean(share[name] for share in shares) for name in shares[0]}


_HEADER = (
    "width", "method", "sparsity", "realised", "bits a weight", "MB a token", "of dense",
    "nats over dense",
)  # fmt: skip


def _cells(row: Mapping[str, Any]) -> list[str]:
    return [
        row["width"], row["method"], f"{row['sparsity']:.0%}", f"{row['realised']:.3f}",
        f"{row['bits']:.2f}", f"{row['bytes'] / 1e6:.1f}", f"{row['share']:.3f}",
        f"{row['nats_over_dense']:.4f}",
    ]  # fmt: skip


def write_frontier(
    folder: Path, title: str, rows: Sequence[dict[str, Any]], note: str
) -> dict[str, Path]:
    """``frontier.json``, ``frontier.md`` and ``frontier.png`` in a folder; name → path."""
    paths = {name: folder / name for name in ("frontier.json", "frontier.md", "frontier.png")}
    document = {"title": title, "note": note, "rows": list(rows)}
    write_atomically(paths["frontier.json"], (json.dumps(document, indent=1) + "\n").encode())
    lines = [
        f"# {title}",
        "",
        "Bytes of one decoded token: kept rows with their scales, head (in int8 where projections "
        "are integers, unless it is one of them), norms, thresholds, corrections, rotations. "
        "**Bold**: no other row reads less and loses less.",
        *(["", note] if note else []),
        "",
        f"| {' | '.join(_HEADER)} |",
        "|" + " --- |" * len(_HEADER),
    ]
    for row in rows:
        shown = [f"**{cell}**" for cell in _cells(row)] if row["best"] else _cells(row)
        lines.append(f"| {' | '.join(shown)} |")
    write_atomically(paths["frontier.md"], ("\n".join(lines) + "\n").encode())
    draw_frontier(title, rows, note, paths["frontier.png"])
    return paths


def print_frontier(
    title: str, rows: Sequence[dict[str, Any]], paths: Mapping[str, Path], note: str
) -> None:
    """A table for people, then the JSON line."""
    table = Table(title=title)
    for column in (*_HEADER, "best"):
        left = column in ("width", "method")
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*_cells(row), "*" if row["best"] else "")
    console = Console(width=120)
    console.print(table)
    if note:
        console.print(note)
    files = {name: str(path) for name, path in paths.items()}
    print(json.dumps({"rows": list(rows), "note": note, "files": files}))


def draw_frontier(title: str, rows: Sequence[Mapping[str, Any]], note: str, path: Path) -> None:
    """Loss against the share of bytes read: a line for each width and method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8.5, 5.2), layout="constrained")
    widths = list(dict.fromkeys(row["width"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows if row["sparsity"]))

    def style(width: int, method: int) -> dict[str, Any]:
        return {
            "color": f"C{width}", "marker": "osD^vP*X"[method % 8], "markersize": 4,
            "linestyle": ("-", "--", ":", "-.")[method % 4],
        }  # fmt: skip

    for w, width in enumerate(widths):
        dense = [row for row in rows if row["width"] == width and not row["sparsity"]]
        for m, method in enumerate(methods):
            own = [row for row in rows if (row["width"], row["method"]) == (width, method)]
            points = sorted((100 * r["share"], r["nats_over_dense"]) for r in (*dense, *own))
            axes.plot([x for x, _ in points], [y for _, y in points], **style(w, m))
    best = sorted((100 * r["share"], r["nats_over_dense"]) for r in rows if r.get("best"))
    axes.plot([x for x, _ in best], [y for _, y in best], color="0.85", linewidth=6, zorder=0)
    # One key for colours, one for markers: their product would be as long as the table.
    keys = [axes.plot([], [], color=f"C{w}", label=width)[0] for w, width in enumerate(widths)]
    keys += [
        axes.plot([], [], **{**style(0, m), "color": "0.3"}, label=method)[0]
        for m, method in enumerate(methods)
    ]
    keys += axes.plot([], [], color="0.85", linewidth=6, label="no row is better")
    # The loss of rounding can be a hair below zero; the axis is linear close to it.
    axes.set_yscale("symlog", linthresh=0.01)
    axes.set_xlabel("bytes read per token, % of the dense model's")
    axes.set_ylabel("nats over dense")
    axes.grid(alpha=0.3)
    axes.legend(handles=keys, fontsize=8)
    axes.set_title(title, fontsize=9)
    if note:
        figure.supxlabel("\n".join(textwrap.wrap(note, 110)), fontsize=7)
    figure.savefig(path, dpi=150)
    plt.close(figure)
