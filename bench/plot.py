"""Pictures of runs: speed-up against sparsity with the ideal line, tokens/s, bytes by kind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from wina.bench.profile import KINDS as PROFILE_KINDS
from wina.bench.roofline import KINDS
from wina.errors import WinaError

# One colour for each kind of bytes, sparse kinds in blues: what sparsity shrinks is blue.
KIND_COLOURS = dict(
    zip(
        KINDS,
        ("#08519c", "#3182bd", "#6baed6", "#bdbdbd", "#e6550d", "#969696", "#525252", "#31a354",
         "#dadaeb", "#756bb1", "#fdae6b"),
        strict=True,
    )
)  # fmt: skip
# What reads weights is blue here, too.
PROFILE_COLOURS = dict(
    zip(
        PROFILE_KINDS,
        ("#08519c", "#6baed6", "#9ecae1", "#e6550d", "#fdae6b", "#969696", "#525252"),
        strict=True,
    )
)  # fmt: skip
_MARKERS = "osD^vP*X"
MOST_SERIES = 12


def draw(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw runs of one bench into a PNG.

    Raises:
        WinaError: the runs are of different benches, or hold nothing to draw.
    """
    benches = {str(run["bench"]) for run in runs}
    if len(benches) != 1:
        raise WinaError(f"runs of different benches cannot share a picture: {sorted(benches)}")
    painters: dict[str, Callable[[Sequence[Mapping[str, Any]]], Any]] = {
        "kernels": _draw_kernels,
        "decode": _draw_decode,
        "roofline": _draw_roofline,
        "profile": _draw_profile,
    }
    if not any(run["rows"] for run in runs):
        raise WinaError("the runs hold no rows to draw")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure = painters[benches.pop()](runs)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise WinaError(f"cannot write {path}: {error}") from None
    finally:
        plt.close(figure)


def _draw_roofline(runs: Sequence[Mapping[str, Any]]) -> Any:
    from matplotlib import pyplot as plt

    figure, (stack, speed) = plt.subplots(1, 2, figsize=(13, 4.8), layout="constrained")
    wide = len(runs) > 1
    bars = [(run, row) for run in runs for row in run["rows"]]
    bottom = [0.0] * len(bars)
    totals = [row["total_bytes"] / 1e9 for _, row in bars]
    for kind in KINDS:
        heights = [row["bytes"].get(kind, 0.0) / 1e9 for _, row in bars]
        # What cannot be seen in a bar would only fill the legend; the table has it.
        if any(h > 1e-3 * t for h, t in zip(heights, totals, strict=True)):
            stack.bar(range(len(bars)), heights, bottom=bottom, label=kind, width=0.75,
                      color=KIND_COLOURS[kind])  # fmt: skip
            bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    names = [("dense" if row["sparsity"] == 0 else f"{row['sparsity']:.0%}") for _, row in bars]
    if wide:
        names = [f"{run['model']} {name}" for (run, _), name in zip(bars, names, strict=True)]
    stack.set_xticks(range(len(bars)), names, rotation=45 if wide else 0,
                     ha="right" if wide else "center")  # fmt: skip
    for index, (total, (_, row)) in enumerate(zip(bottom, bars, strict=True)):
        speed_text = f"{row['tokens_per_s']:,.{0 if row['tokens_per_s'] >= 100 else 1}f} tok/s"
        stack.annotate(speed_text, (index, total), ha="center", va="bottom", fontsize=8)
    stack.set_ylabel("GB read by one decode step")
    stack.set_ylim(0, 1.08 * max(bottom))
    stack.legend(fontsize=8, reverse=True, loc="center left", bbox_to_anchor=(1.01, 0.5),
                 frameon=False)  # fmt: skip
    for run, marker in zip(runs, _cycle(_MARKERS), strict=False):
        rows = run["rows"]
        x = [100 * row["sparsity"] for row in rows]
        speed.plot(x, [row["speedup"] for row in rows], marker=marker,
                   label=f"{run['model']} on {run['device']['name']}")  # fmt: skip
        for row in rows[1:]:
            speed.annotate(f"{row['speedup']:.2f}×", (100 * row["sparsity"], row["speedup"]),
                           xytext=(-4, 5), textcoords="offset points", ha="right",
                           fontsize=8)  # fmt: skip
    x = sorted({100 * row["sparsity"] for run in runs for row in run["rows"]})
    _plot_limit(speed, x)
    _label_speed(speed, "predicted speed-up over dense")
    figure.suptitle(_caption(runs))
    return figure


def _draw_profile(runs: Sequence[Mapping[str, Any]]) -> Any:
    from matplotlib import pyplot as plt

    rows = [row for run in runs for row in run["rows"]]
    figure, axes = plt.subplots(figsize=(9, 1.8 + 0.45 * len(rows)), layout="constrained")
    left = [0.0] * len(rows)
    for kind in PROFILE_KINDS:
        widths = [row["ms"].get(kind, 0.0) for row in rows]
        if any(widths):
            axes.barh(range(len(rows)), widths, left=left, label=kind,
                      color=PROFILE_COLOURS[kind])  # fmt: skip
            left = [x + width for x, width in zip(left, widths, strict=True)]
    differing = [f for f in ("dtype", "context") if len({str(row[f]) for row in rows}) > 1]
    axes.set_yticks(range(len(rows)), [_bar_name(row, differing) for row in rows])
    for index, (total, row) in enumerate(zip(left, rows, strict=True)):
        axes.annotate(f"{row['tokens_per_s']:.0f} tokens/s", (total, index), va="center",
                      xytext=(4, 0), textcoords="offset points", fontsize=8)  # fmt: skip
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel("milliseconds of a decoded token")
    figure.legend(fontsize=8, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(_caption(runs), fontsize=10)
    return figure


def _draw_kernels(runs: Sequence[Mapping[str, Any]]) -> Any:
    from matplotlib import pyplot as plt

    figure, (speed, width) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    fields = ("operator", "backend", "dtype", "weight_dtype", "shape", "tokens")
    series = dict(list(_series(runs, fields).items())[:MOST_SERIES])
    for (label, rows), marker in zip(series.items(), _cycle(_MARKERS), strict=False):
        x = [100 * row["sparsity"] for row in rows]
        y = [row["speedup_vs_torch"] for row in rows]
        (line,) = speed.plot(x, y, marker=marker, markersize=4, linewidth=1.2, label=label)
        speed.fill_between(x, [row["low"] for row in rows], [row["high"] for row in rows],
                           color=line.get_color(), alpha=0.12, linewidth=0)  # fmt: skip
        width.plot(x, [100 * row["bandwidth_share"] for row in rows], marker=marker,
                   markersize=4, linewidth=1.2, color=line.get_color(), label=label)  # fmt: skip
    x = sorted({100 * row["sparsity"] for rows in series.values() for row in rows})
    _plot_limit(speed, x)
    _label_speed(speed, "speed-up over F.linear")
    width.axhline(100, color="0.4", linestyle="--", label="plain read")
    width.set_ylim(bottom=0)
    width.set_xlabel("input channels skipped, %")
    width.set_ylabel("bandwidth on kept bytes, % of a plain read")
    width.grid(alpha=0.3)
    speed.get_legend().remove()
    handles, labels = speed.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", fontsize=7, ncols=3)
    figure.set_figheight(4.8 + 0.07 * len(labels))
    total = len(_series(runs, fields))
    shown = f"\nthe first {MOST_SERIES} of {total} series" if total > MOST_SERIES else ""
    figure.suptitle(_caption(runs) + shown)
    return figure


def _draw_decode(runs: Sequence[Mapping[str, Any]]) -> Any:
    from matplotlib import pyplot as plt

    figure, (speed, bars) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    series = _series(runs, ("engine", "method", "dtype", "batch", "context"),
                     lambda row: row["method"] != "dense")  # fmt: skip
    colours = _method_colours(row for run in runs for row in run["rows"])
    # One line a method takes the colour of its bars; more lines need colours of their own.
    one_each = len(series) < len(colours)
    for (label, rows), marker in zip(series.items(), _cycle(_MARKERS), strict=False):
        x = [0.0, *(100 * row["realised"] for row in rows)]
        y = [1.0, *(row["speedup_vs_dense"] for row in rows)]
        (line,) = speed.plot(x, y, marker=marker, label=label,
                             color=colours[rows[0]["method"]] if one_each else None)  # fmt: skip
        errors = (
            [row["speedup_vs_dense"] - row["low"] for row in rows],
            [row["high"] - row["speedup_vs_dense"] for row in rows],
        )
        speed.errorbar(x[1:], y[1:], yerr=errors, fmt="none", color=line.get_color(), capsize=3)
        speed.plot(x, [1.0, *(row["byte_ideal"] for row in rows)], linestyle="--", linewidth=1,
                   color=line.get_color(), alpha=0.6)  # fmt: skip
    speed.plot([], [], linestyle="--", color="0.5", label="byte ideal")
    _label_speed(speed, "decode speed relative to dense")
    speed.set_xlabel("projection weights skipped by a token, %")
    rows = [row for run in runs for row in run["rows"]]
    positions = range(len(rows))
    bars.barh(positions, [row["tokens_per_s"] for row in rows],
              color=[colours[row["method"]] for row in rows])  # fmt: skip
    differing = [
        field
        for field in ("engine", "dtype", "batch", "context")
        if len({str(row[field]) for row in rows}) > 1
    ]
    bars.set_yticks(positions, [_bar_name(row, differing) for row in rows], fontsize=8)
    for index, row in enumerate(rows):
        bars.annotate(f"{row['tokens_per_s']:.1f}", (row["tokens_per_s"], index), va="center",
                      xytext=(4, 0), textcoords="offset points", fontsize=8)  # fmt: skip
    bars.invert_yaxis()
    bars.margins(x=0.12)
    bars.set_xlabel("decoded tokens/s")
    figure.set_figheight(max(4.8, 1.5 + 0.25 * len(rows)))
    figure.suptitle(_caption(runs))
    return figure


def _series(
    runs: Sequence[Mapping[str, Any]],
    fields: Sequence[str],
    wanted: Callable[[Mapping[str, Any]], bool] = lambda row: True,
) -> dict[str, list[Mapping[str, Any]]]:
    """Label → rows in order of sparsity; labels name only fields that differ."""
    tagged = [(run, row) for run in runs for row in run["rows"] if wanted(row)]
    differing = [f for f in fields if len({str(row.get(f)) for _, row in tagged}) > 1]
    found: dict[str, list[Mapping[str, Any]]] = {}
    for run, row in tagged:
        words = [_word(field, row.get(field)) for field in differing or fields[:2]]
        if len(runs) > 1:
            words.insert(0, f"{run['title']} {run['machine'].get('commit') or ''}".strip())
        found.setdefault(" ".join(words), []).append(row)
    for rows in found.values():
        rows.sort(key=lambda row: row["sparsity"])
    return found


def _method_colours(rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Method → colour; dense is grey."""
    methods = [m for m in dict.fromkeys(str(row["method"]) for row in rows) if m != "dense"]
    return {"dense": "0.6", **{method: f"C{i % 10}" for i, method in enumerate(methods)}}


def _word(field: str, value: Any) -> str:
    if field == "shape":
        return "×".join(map(str, value))
    return f"{field} {value}" if field in ("batch", "context", "tokens") else str(value)


def _bar_name(row: Mapping[str, Any], differing: Sequence[str]) -> str:
    name = "dense" if row["method"] == "dense" else f"{row['method']} {row['sparsity']:.0%}"
    if "engine" in differing:
        name += f" {str(row['engine']).removeprefix('transformers ')}"
    return ", ".join([name, *(_word(f, row[f]) for f in differing if f != "engine")])


def _plot_limit(axes: Any, x: Iterable[float]) -> None:
    """1/(1 − s): nothing but the projections' weights."""
    last = min(95, int(max(x, default=0)))
    points = range(last + 1)
    axes.plot(points, [100 / (100 - p) for p in points], color="0.4", linestyle="--",
              label="1/(1−s)")  # fmt: skip


def _label_speed(axes: Any, label: str) -> None:
    axes.axhline(1.0, color="0.7", linestyle=":")
    axes.set_xlabel("input channels skipped, %")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _caption(runs: Sequence[Mapping[str, Any]]) -> str:
    titles = " | ".join(dict.fromkeys(str(run["title"]) for run in runs))
    if runs[0]["bench"] == "roofline":
        return titles
    machine = runs[0]["machine"]
    where = machine.get("gpu") or machine["cpu"]
    return f"{titles}\n{where}, {machine['threads']} threads, commit {machine['commit']}"


def _cycle(symbols: str) -> Iterable[str]:
    while True:
        yield from symbols
