"""Tables of runs for people, and the JSON line for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from wina.bench.profile import KINDS as PROFILE_KINDS
from wina.bench.runs import KINDS, compare_runs, different_machines, load, repeated, run_at, save
from wina.bench.timing import NOISE_LIMIT, STEADY, TOO_FEW, TOO_NOISY

# Short forms for tables; a steady ratio needs no word.
VERDICTS = {STEADY: "", TOO_NOISY: "noisy", TOO_FEW: "few"}
SHARED = ("operator", "backend", "dtype", "weights", "tokens", "engine", "batch", "context")
Column = tuple[str, Callable[[Mapping[str, Any]], str]]
WIDTH = 160


def _times(field: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda row: "" if row.get(field) is None else f"{row[field]:.2f}×"


def _number(field: str, form: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda row: "" if row.get(field) is None else format(row[field], form)


def _milliseconds(kind: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda row: f"{row['ms'].get(kind, 0.0):.2f}"


def _text(field: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda row: str(row[field])


def _peers(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {ratio:.2f}×" for name, ratio in row["speedup_vs_peers"].items())


def _interval(row: Mapping[str, Any]) -> str:
    return "" if row.get("low") is None else f"{row['low']:.2f}–{row['high']:.2f}"


def _verdict(row: Mapping[str, Any]) -> str:
    return VERDICTS.get(str(row["verdict"]), str(row["verdict"]).partition(":")[0])


COLUMNS: dict[str, tuple[Column, ...]] = {
    "kernels": (
        ("operator", lambda row: str(row["operator"]).removeprefix("sparse_")),
        ("backend", _text("backend")),
        ("dtype", _text("dtype")),
        ("weights", lambda row: str(row.get("weight_dtype") or row["dtype"])),
        ("[N, K]", lambda row: "×".join(map(str, row["shape"]))),
        ("tokens", _text("tokens")),
        ("sparsity", _number("sparsity", ".2f")),
        ("µs", _number("time_us", ".1f")),
        ("GB/s", _number("bandwidth_gb_s", ".1f")),
        ("of read", _number("bandwidth_share", ".0%")),
        ("vs own", _times("speedup_vs_own_dense")),
        ("vs torch", _times("speedup_vs_torch")),
        ("95 %", _interval),
        ("even at s", _number("break_even_sparsity", ".2f")),
        ("to tokens", lambda row: str(row["break_even_tokens"] or "")),
        ("verdict", _verdict),
    ),
    "decode": (
        ("engine", lambda row: str(row["engine"]).removeprefix("transformers ")),
        ("method", _text("method")),
        ("sparsity", _number("sparsity", ".2f")),
        ("realised", _number("realised", ".3f")),
        ("batch", _text("batch")),
        ("context", _text("context")),
        ("first ms", _number("first_token_ms", ".1f")),
        ("prefill /s", _number("prefill_tokens_per_s", ".0f")),
        ("tokens/s", _number("tokens_per_s", ".1f")),
        ("p50 ms", _number("ms_p50", ".2f")),
        ("p95 ms", _number("ms_p95", ".2f")),
        ("vs dense", _times("speedup_vs_dense")),
        ("95 %", _interval),
        ("vs best", _times("speedup_vs_best_dense")),
        ("ideal", _times("byte_ideal")),
        ("GiB", _number("memory_gib", ".2f")),
        ("verdict", _verdict),
    ),
    "peers": (
        ("engine", _text("engine")),
        ("method", _text("method")),
        ("sparsity", _number("sparsity", ".2f")),
        ("dtype", _text("dtype")),
        ("tokens/s", _number("tokens_per_s", ".1f")),
        ("ms", _number("ms_per_step", ".2f")),
        ("vs best peer", _times("speedup_vs_best_peer")),
        ("95 %", _interval),
        ("vs", _peers),
        ("next tokens", _number("agreement", ".0%")),
        ("verdict", _verdict),
    ),
    "profile": (
        ("method", _text("method")),
        ("sparsity", _number("sparsity", ".2f")),
        ("dtype", _text("dtype")),
        ("weights", _text("weight_dtype")),
        ("context", _text("context")),
        *((kind, _milliseconds(kind)) for kind in PROFILE_KINDS),
        ("ms a token", _number("ms_per_token", ".2f")),
        ("not weights", _number("not_weights", ".0%")),
        ("tokens/s", _number("tokens_per_s", ".1f")),
    ),
    "roofline": (
        ("sparsity", _number("sparsity", ".2f")),
        ("batch", _text("batch")),
        ("context", _text("context")),
        ("GB a step", lambda row: f"{row['total_bytes'] / 1e9:.3f}"),
        ("GMAC a step", lambda row: f"{row['total_macs'] / 1e9:.3f}"),
        ("paper's GFLOPs", _number("published_gmacs", ".2f")),
        ("with rotation", _number("published_gmacs_with_rotation", ".2f")),
        ("ms a step", _number("ms_per_step", ".3f")),
        ("tokens/s", _number("tokens_per_s", ".1f")),
        ("vs dense", _times("speedup")),
        ("bound by", _text("bound")),
    ),
}


def table_of(run: Mapping[str, Any]) -> Table:
    """The rows of a run."""
    columns = COLUMNS[str(run["bench"])]
    rows = run["rows"]
    # What is the same in all rows is said once, in the title.
    shared = [
        (name, show(rows[0]))
        for name, show in columns
        if name in SHARED and len(rows) > 1 and len({show(row) for row in rows}) == 1
    ]
    title = ", ".join([str(run["title"]), *(f"{name} {value}" for name, value in shared)])
    columns = tuple(column for column in columns if column[0] not in dict(shared))
    table = Table(title=title)
    for name, _ in columns:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(show(row) for _, show in columns))
    return table


def kinds_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Bytes by kind of a roofline: one column for each row of the run."""
    table = Table(title="megabytes read by one decode step, by kind")
    table.add_column("kind")
    for row in rows:
        table.add_column(f"{row['sparsity']:.0%}", justify="right")
    for kind in dict.fromkeys(kind for row in rows for kind in row["bytes"]):
        read = [row["bytes"].get(kind, 0.0) for row in rows]
        table.add_row(kind, *(f"{b / 1e6:.3f}" if b < 1e6 else f"{b / 1e6:,.1f}" for b in read))
    return table


def comparison_table(title: str, bench: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Rows of :func:`wina.bench.runs.compare_runs`."""
    kind = KINDS[bench]
    table = Table(title=title)
    for name in (*kind.key, f"{kind.time} old", "new", "faster", "vs dense old", "new", "verdict"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            *(str(row[field]) for field in kind.key),
            f"{row['old']:.4g}", f"{row['new']:.4g}", f"{row['faster']:.2f}×",
            f"{row['speedup_old'] or 0:.2f}×", f"{row['speedup_new'] or 0:.2f}×", row["verdict"],
        )  # fmt: skip
    return table


def publish(
    run: dict[str, Any],
    extra: Sequence[Table] = (),
    output: Path | None = None,
    compare: Path | None = None,
    against: str | None = None,
    arguments: Sequence[str] = (),
) -> None:
    """Show a run, compare it where asked, save it, and end stdout with its JSON line.

    Args:
        run: of :func:`wina.bench.runs.document`.
        extra: tables shown below the main one.
        output: file to save to.
        compare: file of an earlier run.
        against: git ref to measure now, in a worktree, with the same arguments.
        arguments: the command line that makes this run, for ``against``.
    """
    console = Console(width=WIDTH)
    for table in (table_of(run), *extra):
        console.print(table)
    olds = []
    if compare is not None:
        olds.append((str(compare), load(compare)))
    if against is not None:
        olds.append((against, run_at(against, arguments)))
    run["comparisons"] = []
    for name, old in olds:
        rows = compare_runs(old, run)
        console.print(comparison_table(f"{name} → now", str(run["bench"]), rows))
        machines = different_machines(old, run)
        if machines:
            run["warnings"].append(f"{name} was measured elsewhere ({'; '.join(machines)})")
        again = repeated(rows)
        console.print(
            f"Ratios to dense: both runs claim {again['claimed']} of {again['rows']}; "
            f"{again['within']} of these agree within {NOISE_LIMIT:.0%}"
            + (f" (worst: {again['worst']:.1%})" if again["claimed"] else "")
        )
        run["comparisons"].append({"old": name, "rows": rows, "repeated": again})
    for warning in run["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    if output is not None:
        save(run, output)
    print(json.dumps(run))
