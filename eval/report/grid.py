"""A folder of evaluation results as it lies on disk. Nothing is computed here.

The format is described in ``eval/README.md``: ``grid.json`` says what was asked, ``cells/*.json``
hold what was measured, and runs of ``wina bench decode`` may lie beside ``grid.json``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wina.bench import runs
from wina.errors import WinaError
from wina.files import read_json

FORMAT = "wina-eval"
VERSION = 1
DENSE = "dense"
_LARGEST = 1e100  # of a standard error and the like: nothing that was measured

Key = tuple[str, float, str]
"""(method, sparsity, task); dense has sparsity 0."""


@dataclass(frozen=True)
class Metric:
    """A measured value with its standard error, if one is known."""

    value: float
    stderr: float | None
    higher_is_better: bool


@dataclass(frozen=True)
class Agreement:
    """How close the next-token distributions are to the dense model's.

    Attributes:
        kl: KL(dense ‖ sparse), nats per token.
        kl_stderr: its standard error.
        top1: share of tokens with the same most likely next token.
    """

    kl: float | None
    kl_stderr: float | None
    top1: float | None


@dataclass(frozen=True)
class Cell:
    """One method at one sparsity on one task.

    Attributes:
        method: its name.
        sparsity: what was asked for.
        task: its name.
        kind: lm_eval, perplexity, agreement, needle, generation.
        metrics: name → value.
        primary: the metric that stands for the cell.
        rows: metric → one value per document, in document order.
        agreement: with the dense model, if measured.
        realised: share of projection weights skipped, by bytes; None if not measured.
        projections: projection → the share skipped there.
        samples: (prompt, generated text).
        seconds: what it took.
    """

    method: str
    sparsity: float
    task: str
    kind: str
    metrics: Mapping[str, Metric]
    primary: str
    rows: Mapping[str, tuple[float, ...]]
    agreement: Agreement | None
    realised: float | None
    projections: Mapping[str, float]
    samples: tuple[tuple[str, str], ...]
    seconds: float | None

    @property
    def key(self) -> Key:
        """What identifies it inside a grid."""
        return self.method, self.sparsity, self.task

    @property
    def metric(self) -> Metric:
        """The primary one."""
        return self.metrics[self.primary]


@dataclass(frozen=True)
class Grid:
    """What was asked and what there is.

    Attributes:
        header: grid.json without its list of cells.
        settings: (method, sparsity) in the order asked, dense first.
        tasks: in the order asked.
        cells: those that were read.
        benches: runs of ``wina bench decode``.
        warnings: what was left out, and why.
    """

    header: Mapping[str, Any]
    settings: tuple[tuple[str, float], ...]
    tasks: tuple[str, ...]
    cells: Mapping[Key, Cell]
    benches: tuple[Mapping[str, Any], ...]
    warnings: tuple[str, ...]


def load(folder: Path, benches: Sequence[Path] = ()) -> Grid:
    """Read a grid, finished or not.

    Only the cells that grid.json names are read: the folder may hold those of other grids. One that
    cannot be read is left out with a warning: the report then shows it as missing.

    Args:
        folder: with grid.json.
        benches: files of ``wina bench decode --output``, besides those in the folder.

    Raises:
        WinaError: there is no grid, it is of another version, or a bench file is no decode run.
    """
    header = _document(folder / "grid.json")
    if header is None:
        raise WinaError(
            f"{folder} holds no readable grid.json: name the --output folder of a `wina eval` grid"
        )
    if header.get("format") != FORMAT or header.get("version") != VERSION:
        raise WinaError(
            f"{folder / 'grid.json'} is {header.get('format')!r} of version "
            f"{header.get('version')}; this wina reads {FORMAT!r} of version {VERSION}"
        )
    try:
        named = {
            (str(c["method"]), float(c["sparsity"]), str(c["task"])): str(c["key"])
            for c in header["cells"]
        }
    except (KeyError, TypeError, ValueError) as error:
        raise WinaError(f"{folder / 'grid.json'} does not name its cells ({error!r})") from None
    for field, kind in (("tasks", list), ("versions", dict)):
        if not isinstance(header.get(field, kind()), kind):
            raise WinaError(f"{folder / 'grid.json'}: {field} must be a {kind.__name__} in JSON")
    cells, warnings = _cells(folder / "cells", named)
    beside = [path for path in sorted(folder.glob("*.json")) if _is_decode_run(path)]
    found = [_decode_run(path) for path in dict.fromkeys([*beside, *benches])]
    return Grid(
        header={name: value for name, value in header.items() if name != "cells"},
        settings=tuple(dict.fromkeys((method, sparsity) for method, sparsity, _ in named)),
        tasks=tuple(dict.fromkeys(task for _, _, task in named)),
        cells=cells,
        benches=tuple(found),
        warnings=tuple(warnings),
    )


def _cells(folder: Path, named: Mapping[Key, str]) -> tuple[dict[Key, Cell], list[str]]:
    """The cells that are there, and what is wrong with those that are not as they should be."""
    cells: dict[Key, Cell] = {}
    warnings = []
    for key, name in named.items():
        path = folder / f"{name}.json"
        try:
            if not name.isalnum():  # a digest, and no way out of the folder
                raise ValueError("its key is no digest")
            if not path.exists():
                continue
            data = _document(path)
            if data is None or data.get("format") != FORMAT or data.get("version") != VERSION:
                raise ValueError("no cell of this version")
            cell = _cell(data)
            if cell.key != key:
                raise ValueError(f"it is a cell of {cell.method}, {cell.sparsity}, {cell.task}")
            cells[key] = cell
        except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
            warnings.append(f"{path.name} is left out ({error}): remove it and measure it again")
    return cells, warnings


def _cell(data: Mapping[str, Any]) -> Cell:
    metrics = {
        str(name): Metric(
            float(entry["value"]),
            _number(entry.get("stderr")),
            bool(entry.get("higher_is_better", True)),
        )
        for name, entry in data["metrics"].items()
    }
    if not metrics:
        raise ValueError("no metric")
    primary = data.get("primary")
    agreement = data.get("agreement") or {}
    realised = data.get("realised") or {}
    numbers = [_number(agreement.get(name)) for name in ("kl", "kl_stderr", "top1")]
    return Cell(
        method=str(data["method"]),
        sparsity=float(data["sparsity"]),
        task=str(data["task"]),
        kind=str(data.get("kind") or "lm_eval"),
        metrics=metrics,
        primary=primary if primary in metrics else next(iter(metrics)),
        rows={str(name): _rows(values) for name, values in (data.get("rows") or {}).items()},
        agreement=Agreement(*numbers) if agreement else None,
        realised=_number(realised.get("overall")),
        projections={
            str(name): float(share) for name, share in (realised.get("projections") or {}).items()
        },
        samples=tuple(
            (str(sample.get("prompt", "")), str(sample.get("text", "")))
            for sample in data.get("samples") or ()
        ),
        seconds=_number(data.get("seconds")),
    )


def _number(value: Any) -> float | None:
    """A float of a size that can be squared and summed, or None."""
    if isinstance(value, (int, float)) and abs(value) <= _LARGEST:
        return float(value)
    return None


def _rows(values: Any) -> tuple[float, ...]:
    """Per-document values; none if any of them is not a number."""
    if not isinstance(values, list) or not all(isinstance(v, (int, float)) for v in values):
        return ()
    return tuple(float(v) for v in values)


def _document(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None if the file is missing, damaged or something else."""
    try:
        found = read_json(path)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _is_decode_run(path: Path) -> bool:
    found = _document(path) or {}
    return found.get("format") == runs.FORMAT and found.get("bench") == "decode"


def _decode_run(path: Path) -> dict[str, Any]:
    run = runs.load(path)
    if run["bench"] != "decode":
        raise WinaError(
            f"{path} is a {run['bench']} run; the report shows runs of `wina bench decode --output`"
        )
    return run
