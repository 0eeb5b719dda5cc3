"""Grids: methods × sparsities × tasks, one file a cell, resumable.

The layout of the folder stands in ``eval/README.md``.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from wina.allocation import Measurements
from wina.bench.machine import machine_card
from wina.calibration import calibrate
from wina.config import SparsityConfig
from wina.decoding.head import read_rounded, usual_head
from wina.errors import PlanError, WinaError
from wina.eval.agreement import Comparison, DenseLogits
from wina.eval.columns import BACKEND, Column
from wina.eval.measurement import EvalTask, Measurement, Settings, Trial
from wina.files import read_json, remove_partial, write_atomically
from wina.inspection import inspect
from wina.patch import apply_plan, restore
from wina.plan import SparsityPlan
from wina.rotation import rotated

FORMAT = "wina-eval"
VERSION = 1
PACKAGES = ("wina", "torch", "transformers", "tokenizers", "lm_eval", "datasets")


@dataclass(frozen=True)
class Grid:
    """What is to be measured.

    Attributes:
        columns: the dense model first.
        tasks: name → task.
        protocol: the prefill protocol.
        settings: of the tasks.
        agreement_tokens: tokens of each task's own text on which sparse and dense predictions are
            compared; 0 for none.
        model: as the user named it, for ``grid.json``; the folder it was loaded from if empty.
        more: further facts for ``grid.json``.
    """

    columns: Sequence[Column]
    tasks: Mapping[str, EvalTask]
    protocol: str
    settings: Settings
    agreement_tokens: int = 2048
    model: str = ""
    more: Mapping[str, Any] = field(default_factory=dict)


def fingerprint(model: nn.Module) -> str:
    """sha256 of a model's parameter names, shapes, dtypes and a sample of each one's values."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 64)].float().cpu()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def versions() -> dict[str, str | None]:
    """Versions of the packages that a number depends on."""
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


class GridRun:
    """A grid on a model, in a folder.

    Args:
        lm: :class:`wina.integrations.lm_eval.WinaLM` around a dense model; dense again afterwards.
        grid: what to measure.
        folder: made if missing; cells that it holds are not measured again.
        texts: calibration texts, the bundled one by default.
        show_progress: lines on stderr.
    """

    def __init__(
        self,
        lm: Any,
        grid: Grid,
        folder: Path,
        texts: Sequence[str] | Tensor | None = None,
        show_progress: bool = True,
    ) -> None:
        self.lm = lm
        self.grid = grid
        self.folder = folder
        self.texts = texts
        self.show_progress = show_progress
        self.fingerprint = fingerprint(lm.model)
        self.versions = versions()
        self.plan_texts = "bundled" if texts is None else _digest([str(text) for text in texts])
        self.dense_logits: tuple[object, DenseLogits] = (None, DenseLogits())
        self.measurements = Measurements(
            max(column.sparsity for column in grid.columns),
            folder / "measurements",
            {"model": self.fingerprint, "texts": self.plan_texts, "versions": self.versions},
        )

    def run(self) -> list[dict[str, Any]]:
        """Measure what is missing; return every cell, the dense ones first."""
        for folder in (self.folder / "cells", self.folder / "plans"):
            folder.mkdir(parents=True, exist_ok=True)
        remove_partial(self.folder)
        places = [(column, name) for column in self.grid.columns for name in self.grid.tasks]
        self._write_index(places)
        cells: dict[tuple[Column, str], dict[str, Any]] = {}
        for place in places:
            cell = read_cell(self._path(*place))
            if cell is not None:
                cells[place] = cell
        clock = _Clock([place for place in places if place not in cells], self.show_progress)
        clock.say(f"{len(places)} cells, {len(cells)} of them measured before")
        waiting = {
            column: [name for name in self.grid.tasks if (column, name) not in cells]
            for column in self.grid.columns
        }
        unfinished = [column for column in self.grid.columns if waiting[column]]
        # Columns with the same rotation that follow each other are measured on one rotated model.
        for rotation, columns in groupby(unfinished, key=lambda column: column.rotation):
            with rotated(self.lm.model, rotation, self.lm.tokenizer, show_progress=False):
                for column in columns:
                    with self._patched(column):
                        for name in waiting[column]:
                            dense = cells.get((self.grid.columns[0], name))
                            cell = self._measure(column, name, dense)
                            cells[column, name] = cell
                            clock.done((column, name), cell)
        return [cells[place] for place in places]

    @contextmanager
    def _patched(self, column: Column) -> Iterator[None]:
        if column.config is None:
            yield
            return
        plan = self._plan(column.config)
        apply_plan(self.lm.model, plan, column.config.prefill, BACKEND, keep_original=True)
        try:
            with read_rounded(self.lm.model, usual_head(column.config)):
                yield
        finally:
            restore(self.lm.model)

    def _plan(self, config: SparsityConfig) -> SparsityPlan:
        """The saved plan of a config, or a new one, saved. It does not depend on the protocol."""
        config = replace(config, prefill="dense")
        identity = {
            "model": self.fingerprint, "config": config.record(), "parts": config.parts(),
            "texts": self.plan_texts, "versions": self.versions,
        }  # fmt: skip
        folder = self.folder / "plans" / _digest(identity)
        if folder.is_dir():
            try:
                plan = SparsityPlan.load(folder)
                plan.check(self.lm.model)
            except PlanError:  # cut short by a kill: the same text gives the same plan again
                pass
            else:
                return plan
        texts = self.texts
        show = self.show_progress and sys.stderr.isatty()
        plan = calibrate(
            self.lm.model, self.lm.tokenizer, config, texts, show, self.measurements
        )  # fmt: skip
        plan.save(folder)
        return plan

    def _measure(
        self, column: Column, name: str, dense: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        began = time.perf_counter()
        comparison = None
        if column.config is not None and self.grid.agreement_tokens:
            dense_logits = self._dense_logits(column.config)
            comparison = Comparison(self.lm.model, self.grid.agreement_tokens, dense_logits)
        task = self.grid.tasks[name]
        measured = task.measure(Trial(self.lm, self.grid.settings, dense, comparison))
        cell = self._cell(column, name, measured)
        compared_s = 0.0 if comparison is None else comparison.seconds
        cell["seconds"] = round(time.perf_counter() - began - compared_s, 3)
        if comparison is not None:
            if not comparison.tokens:
                comparison.read(measured.texts)
            if comparison.tokens:
                found = comparison.result()
                cell["agreement"] = {
                    "kl": found.kl, "kl_stderr": found.kl_stderr, "top1": found.top1,
                    "tokens": found.tokens,
                }  # fmt: skip
                cell["realised"] = {"overall": found.realised, "projections": found.by_projection}
        cell["seconds_with_agreement"] = round(time.perf_counter() - began, 3)
        write_atomically(self._path(column, name), _to_json(cell))
        return cell

    def _dense_logits(self, config: SparsityConfig) -> DenseLogits:
        """Of the dense model as it is under this column's masks: rotated, its weights rounded."""
        variant = (config.rotation_spec, config.weight_dtype, config.head)
        if self.dense_logits[0] != variant:
            self.dense_logits = (variant, DenseLogits())
        return self.dense_logits[1]

    def _cell(self, column: Column, name: str, measured: Measurement) -> dict[str, Any]:
        identity = self._identity(column, name)
        return {
            "format": FORMAT,
            "version": VERSION,
            "key": _digest(identity),
            "identity": identity,
            "method": column.label,
            "sparsity": column.sparsity,
            "task": name,
            "kind": self.grid.tasks[name].kind,
            "metrics": {key: asdict(metric) for key, metric in measured.metrics.items()},
            "primary": measured.primary,
            "rows": {key: list(values) for key, values in measured.rows.items()},
            "documents": max((len(values) for values in measured.rows.values()), default=0),
            "agreement": None,
            "realised": None,
            "extra_bytes": inspect(self.lm.model).extra_bytes,
            "samples": list(measured.samples),
            "created": _now(),
        }

    def _identity(self, column: Column, name: str) -> dict[str, Any]:
        """What a cell's numbers depend on. The dense model knows no protocol."""
        identity = {
            "model": self.fingerprint,
            "method": column.label,
            "sparsity": column.sparsity,
            "task": name,
            "source": dict(self.grid.tasks[name].identity()),
            "max_length": int(self.lm.max_length),
            **asdict(self.grid.settings),
            "versions": self.versions,
        }
        if column.config is not None:
            identity |= {
                "config": column.config.record(),
                "parts": column.config.parts(),
                "calibration": self.plan_texts,
                "protocol": self.grid.protocol,
                "agreement_tokens": self.grid.agreement_tokens,
            }
            head = usual_head(column.config)
            identity |= {} if head is None else {"head": head}
        return identity

    def _path(self, column: Column, name: str) -> Path:
        return self.folder / "cells" / f"{_digest(self._identity(column, name))}.json"

    def _write_index(self, places: Sequence[tuple[Column, str]]) -> None:
        """``grid.json``: what the grid is made of, written before it is measured."""
        model = self.lm.model
        sparse = [column for column in self.grid.columns if column.config is not None]
        index = {
            "format": FORMAT,
            "version": VERSION,
            "model": {
                "name": Path(str(model.name_or_path)).name or model.config.model_type,
                "path": self.grid.model or str(model.name_or_path),
                "architecture": model.config.model_type,
                "parameters": sum(p.numel() for p in model.parameters()),
                "dtype": str(model.dtype).removeprefix("torch."),
                "fingerprint": self.fingerprint,
            },
            "methods": list(dict.fromkeys(column.label for column in self.grid.columns)),
            "sparsities": list(dict.fromkeys(column.sparsity for column in sparse)),
            "tasks": list(self.grid.tasks),
            "protocol": self.grid.protocol,
            **asdict(self.grid.settings),
            "agreement_tokens": self.grid.agreement_tokens,
            "max_length": int(self.lm.max_length),
            "batch_size": self.lm.batch_size,
            "cells": [
                {
                    "key": self._path(column, name).stem, "method": column.label,
                    "sparsity": column.sparsity, "task": name,
                }
                for column, name in places
            ],
            "versions": self.versions,
            "machine": machine_card(),
            "created": _now(),
            **self.grid.more,
        }  # fmt: skip
        write_atomically(self.folder / "grid.json", _to_json(index))


def read_cell(path: Path) -> dict[str, Any] | None:
    """A saved cell, or None where there is none.

    Raises:
        WinaError: the file is no cell of this version, or its name is not the digest of its
            identity.
    """
    try:
        cell = read_json(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise WinaError(f"cannot read {path}: {error}. Remove it to measure it again.") from None
    wanted = {"format": FORMAT, "version": VERSION, "key": path.stem}
    if not isinstance(cell, dict) or any(cell.get(key) != wanted[key] for key in wanted):
        raise WinaError(f"{path} is no cell of this version: remove it to measure it again")
    if _digest(cell.get("identity")) != path.stem:
        raise WinaError(f"{path} was altered: its name does not fit its identity. Remove it.")
    return cell


class _Clock:
    """Says on stderr what is done and how long the rest will take."""

    def __init__(self, places: Sequence[tuple[Column, str]], show: bool) -> None:
        self.waiting = list(places)
        self.total = len(places)
        self.show = show
        self.seconds: dict[str, list[float]] = {}

    def say(self, line: str) -> None:
        if self.show:
            print(line, file=sys.stderr, flush=True)

    def done(self, place: tuple[Column, str], cell: Mapping[str, Any]) -> None:
        column, name = place
        self.waiting.remove(place)
        self.seconds.setdefault(name, []).append(cell["seconds_with_agreement"])
        primary = cell["metrics"][cell["primary"]]
        left = sum(self._expected(task) for _, task in self.waiting)
        self.say(
            f"[{self.total - len(self.waiting)}/{self.total}] {column.title}, {name}: "
            f"{cell['primary']} {primary['value']:.4g} in {cell['seconds']:.1f} s; "
            f"about {_duration(left)} left"
        )

    def _expected(self, task: str) -> float:
        """Mean time of this task's cells so far, or of all cells where there is none yet."""
        times = self.seconds.get(task) or [t for known in self.seconds.values() for t in known]
        return sum(times) / len(times)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _digest(document: Any) -> str:
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _to_json(document: Any) -> bytes:
    return (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
