"""lm-eval's task definitions on local files: the table ``tasks/local.yaml``, written out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from wina.errors import WinaError

# A split of a data set → the field of a task that names it. Few-shot splits (`dev`) keep theirs.
_SPLITS = {"train": "training_split", "validation": "validation_split", "test": "test_split"}
_PREFIX = "local_"


@dataclass(frozen=True)
class LocalTask:
    """A row of the table.

    Attributes:
        name: what users call it.
        stock: path of the definition in lm-eval's tasks folder; ``{subject}`` for groups.
        files: split → path in the data folder, likewise.
        primary: the metric that papers report.
        subjects: empty for a single task.
    """

    name: str
    stock: str
    files: Mapping[str, str]
    primary: str
    subjects: tuple[str, ...] = ()

    @property
    def registered(self) -> str:
        """The name under which lm-eval knows it: not the stock one, which it would clash with."""
        return _PREFIX + self.name

    def parts(self) -> dict[str, tuple[str, dict[str, str]]]:
        """Registered name → (stock path, files) of every definition of this row."""
        if not self.subjects:
            return {self.registered: (self.stock, dict(self.files))}
        return {
            f"{self.registered}_{subject}": (
                self.stock.format(subject=subject),
                {split: path.format(subject=subject) for split, path in self.files.items()},
            )
            for subject in self.subjects
        }


@cache
def local_tasks() -> Mapping[str, LocalTask]:
    """The table, by name."""
    text = files("wina").joinpath("eval/tasks/local.yaml").read_text(encoding="utf-8")
    return {
        name: LocalTask(
            name, row["stock"], row["files"], row["primary"], tuple(row.get("subjects", ()))
        )
        for name, row in yaml.safe_load(text).items()
    }


def check_files(task: LocalTask, data: Path) -> dict[str, str]:
    """Path in the data folder → sha256 of every file that a task reads.

    Raises:
        WinaError: a file is missing.
    """
    digests = {}
    for _, paths in task.parts().values():
        for name in paths.values():
            try:
                with (data / name).open("rb") as file:
                    digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise WinaError(
                    f"task {task.name!r} needs {name} in --data {data}: {error.strerror}. The "
                    "table of files is eval/tasks/local.yaml."
                ) from None
    return digests


def write_tasks(tasks: Sequence[LocalTask], data: Path, folder: Path) -> None:
    """Write definitions into ``folder``, for lm-eval's ``include_path``.

    They hold absolute paths of this machine, so they are written anew for each run.
    """
    import lm_eval.tasks

    stock = Path(lm_eval.tasks.__file__).parent
    for task in tasks:
        parts = task.parts()
        for name, (path, paths) in parts.items():
            if not (stock / path).is_file():
                raise WinaError(
                    f"lm-eval has no {path} in {stock}: the version that was tested is in "
                    "constraints.txt"
                )
            _write(folder / f"{name}.yaml", _definition(name, stock / path, paths, data))
        if task.subjects:
            metrics = [{"metric": task.primary, "weight_by_size": True}]
            group = {
                "group": task.registered, "task": list(parts), "aggregate_metric_list": metrics
            }  # fmt: skip
            _write(folder / f"{task.registered}.yaml", group)


def _definition(name: str, stock: Path, paths: Mapping[str, str], data: Path) -> dict[str, Any]:
    return {
        "include": str(stock),
        "task": name,
        "tag": None,  # else it would join the group of the stock task
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {split: str((data / path).resolve()) for split, path in paths.items()}
        },
        **{field: split if split in paths else None for split, field in _SPLITS.items()},
    }


def _write(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(yaml.safe_dump(dict(document), sort_keys=False), encoding="utf-8")
