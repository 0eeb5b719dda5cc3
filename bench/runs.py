"""A run of a bench as one JSON document: written, read back, and compared with another run.

The schema stands in ``bench/README.md``; a change that old readers cannot follow raises VERSION.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from wina.bench.machine import machine_card
from wina.bench.timing import NOISE_LIMIT
from wina.errors import WinaError
from wina.files import parse_json

FORMAT = "wina-bench"
VERSION = 1


@dataclass(frozen=True)
class Kind:
    """How rows of one bench are told apart and compared.

    Attributes:
        key: fields that identify a row.
        time: field with its time; a smaller one is better.
        speedup: field with its ratio to the dense baseline of the same run; a larger one is
            better. It carries over between machine states; a time does not.
    """

    key: tuple[str, ...]
    time: str
    speedup: str


KINDS: dict[str, Kind] = {
    "kernels": Kind(
        (
            "operator",
            "backend",
            "device",
            "shape",
            "dtype",
            "weight_dtype",
            "tokens",
            "sparsity",
            "threads",
        ),
        "time_us",
        "speedup_vs_torch",
    ),
    "decode": Kind(
        ("engine", "method", "sparsity", "dtype", "batch", "context", "threads"),
        "ms_per_step",
        "speedup_vs_dense",
    ),
    "peers": Kind(
        ("engine", "method", "sparsity", "dtype", "context", "threads"),
        "ms_per_step",
        "speedup_vs_best_peer",
    ),
    "profile": Kind(
        ("method", "sparsity", "dtype", "weight_dtype", "context", "threads"),
        "ms_per_token",
        "speedup",
    ),
    "roofline": Kind(("sparsity", "batch", "context"), "ms_per_step", "speedup"),
}


def document(
    bench: str,
    title: str,
    rows: Sequence[Mapping[str, Any]],
    arguments: Mapping[str, Any],
    warnings: Sequence[str] = (),
    **more: Any,
) -> dict[str, Any]:
    """A run, JSON-ready: what was measured, with what settings, on which machine."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "bench": bench,
        "title": title,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "arguments": dict(arguments),
        "machine": machine_card(),
        "warnings": list(warnings),
        **more,
        "rows": [dict(row) for row in rows],
    }


def save(run: Mapping[str, Any], path: Path) -> None:
    """Write a run, making its folder."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise WinaError(f"cannot write {path}: {error}") from None


def load(path: Path) -> dict[str, Any]:
    """Read a run that :func:`save` wrote, or the output of a command whose last line is one."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise WinaError(f"cannot read {path}: {error}") from None
    return parse(text, str(path))


def parse(text: str, source: str) -> dict[str, Any]:
    """A run of a file's text or of a command's whole stdout; ``source`` is for the message."""
    for candidate in (text, text.rstrip().rpartition("\n")[2]):
        try:
            run = parse_json(candidate)
        except ValueError:
            continue
        if not isinstance(run, dict) or run.get("format") != FORMAT:
            break
        if run.get("version") != VERSION or run.get("bench") not in list(KINDS):
            raise WinaError(
                f"{source} is a {run.get('bench')!r} run of version {run.get('version')}; this "
                f"wina reads version {VERSION} of: {', '.join(KINDS)}"
            )
        _check(run, source)
        return run
    raise WinaError(f"{source} holds no run of `wina bench` (write one with --output FILE.json)")


def _check(run: Mapping[str, Any], source: str) -> None:
    """Raise unless what :func:`compare_runs` and the tables rely on is there."""
    kind = KINDS[run["bench"]]
    machine, rows = run.get("machine"), run.get("rows")
    if not isinstance(machine, Mapping) or not isinstance(rows, list):
        raise WinaError(f"{source} is damaged: a run has an object `machine` and a list `rows`")
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise WinaError(f"{source} is damaged: row {number} is no object")
        for field in (kind.time, kind.speedup):
            value: Any = row.get(field)
            if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
                raise WinaError(
                    f"{source} is damaged: {field} of row {number} must be a positive number, not "
                    f"{value!r:.40}"
                )


def compare_runs(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows that both runs have: {key fields, old, new, faster, speedup_old, speedup_new, verdict}.

    ``faster`` is old time / new time. The verdict goes by it, unless either run said that its row
    was too noisy; changes below the noise limit count as none.
    """
    if old["bench"] != new["bench"]:
        raise WinaError(f"a {old['bench']!r} run cannot be compared with a {new['bench']!r} run")
    kind = KINDS[str(new["bench"])]
    before = {_key(row, kind): row for row in old["rows"]}
    rows = []
    for row in new["rows"]:
        match = before.get(_key(row, kind))
        if match is None:
            continue
        faster = match[kind.time] / row[kind.time]
        doubtful = any(r.get("verdict", "steady") != "steady" for r in (match, row))
        rows.append(
            {
                **{field: row.get(field) for field in kind.key},
                "old": match[kind.time],
                "new": row[kind.time],
                "faster": faster,
                "speedup_old": match[kind.speedup],
                "speedup_new": row[kind.speedup],
                "verdict": "too noisy" if doubtful else _change(faster),
            }
        )
    if not rows:
        raise WinaError(
            "the two runs have no row in common: run the same bench with the same shapes, dtypes "
            "and sparsities"
        )
    return rows


def repeated(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How well a second run repeats the claims of a first.

    Args:
        rows: of :func:`compare_runs`.

    Returns:
        {rows, claimed, within, worst}: ratios to the dense baseline in both runs; those that both
        runs claim; those of them that agree within the noise limit; the largest relative
        difference between the two, None if none is claimed. Baselines, whose ratio is 1, are
        left out.
    """
    ratios = [r for r in rows if r["speedup_old"] != 1.0 or r["speedup_new"] != 1.0]
    apart = [
        abs(r["speedup_new"] / r["speedup_old"] - 1.0)
        for r in ratios
        if r["verdict"] != "too noisy" and r["speedup_old"]
    ]
    return {
        "rows": len(ratios),
        "claimed": len(apart),
        "within": sum(a <= NOISE_LIMIT for a in apart),
        "worst": max(apart, default=None),
    }


def different_machines(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Facts of the machine card that differ and make times incomparable."""
    facts = ("cpu", "cores", "threads", "gpu", "torch", "governor")
    return [
        f"{fact}: {old['machine'].get(fact)} → {new['machine'].get(fact)}"
        for fact in facts
        if old["machine"].get(fact) != new["machine"].get(fact)
    ]


def run_at(ref: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Run `wina ARGUMENTS` as it is at another git ref, in a temporary worktree.

    The same Python and libraries are used; native kernels are built anew where they differ.
    """
    source = Path(__file__).resolve().parent
    root = _git(source, "rev-parse", "--show-toplevel")
    with tempfile.TemporaryDirectory(prefix="wina-bench-") as folder:
        tree = Path(folder) / "tree"
        _git(Path(root), "worktree", "add", "--detach", str(tree), ref)
        try:
            print(f"measuring {ref} ...", file=sys.stderr)
            answer = subprocess.run(
                [sys.executable, "-c", "from wina.cli import main; main()", *arguments],
                cwd=tree,
                env={**os.environ, "PYTHONPATH": str(tree)},
                stdout=subprocess.PIPE,
                text=True,
                check=False,
            )
        finally:
            _git(Path(root), "worktree", "remove", "--force", str(tree))
    if answer.returncode != 0:
        raise WinaError(f"`wina {' '.join(arguments)}` failed at {ref}: see the messages above")
    return parse(answer.stdout, f"the output at {ref}")


def _git(folder: Path, *arguments: str) -> str:
    try:
        answer = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise WinaError(f"comparing with a git ref needs git: {error}") from None
    if answer.returncode != 0:
        raise WinaError(f"git {arguments[0]} failed: {answer.stderr.strip()}")
    return answer.stdout.strip()


def _key(row: Mapping[str, Any], kind: Kind) -> str:
    return json.dumps([row.get(field) for field in kind.key])


def _change(faster: float) -> str:
    if abs(faster - 1.0) <= NOISE_LIMIT:
        return "same"
    return "faster" if faster > 1.0 else "slower"
