"""Grids: cells on disk, resumed after a kill, the same numbers twice; tasks on local files."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from tqdm import tqdm
from typer.testing import CliRunner

from wina.cli import app
from wina.config import parse_settings
from wina.errors import ConfigError, UnknownNameError, WinaError
from wina.eval import grid as grid_module
from wina.eval.columns import Column, columns_of
from wina.eval.grid import Grid, GridRun, read_cell
from wina.eval.harness import HarnessTask
from wina.eval.local_tasks import local_tasks
from wina.eval.measurement import KINDS, EvalTask, Settings, Trial
from wina.eval.run import open_tasks, rows_of
from wina.integrations.lm_eval import WinaLM
from wina.patch import is_patched
from wina.testing import tiny_model, tiny_tokenizer

COMMON = {"calibration_tokens": 1024, "window": 128, "prefill": "all"}
OWN = ("perplexity", "needle:100", "generation")


@pytest.fixture(scope="module")
def lm() -> WinaLM:
    return WinaLM(
        tiny_model("llama"), tokenizer=tiny_tokenizer(), max_length=512, batch_size=4,
        show_progress=False,
    )  # fmt: skip


def own_grid(tasks: tuple[str, ...] = OWN, **settings: Any) -> Grid:
    columns = columns_of(["teal", "wina/selector=relative"], [0.4, 0.5], COMMON)
    opened: dict[str, EvalTask] = {}
    for name in tasks:
        kind, _, argument = name.partition(":")
        cls: Any = KINDS[kind]
        opened[name] = cls(argument) if argument else cls()
    chosen = Settings(**{"limit": 2, "window": 64, "stride": 64, "new_tokens": 6, **settings})
    return Grid(columns, opened, "all", chosen, agreement_tokens=100)


def measure(lm: WinaLM, folder: Path, grid: Grid | None = None) -> list[dict[str, Any]]:
    return GridRun(lm, grid or own_grid(), folder, show_progress=False).run()


def contents(folder: Path) -> dict[str, Any]:
    """Everything in a folder but times; plans as bytes."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        name = str(path.relative_to(folder))
        if path.parent.name in ("cells", folder.name):
            document = json.loads(path.read_text())
            for key in ("seconds", "seconds_with_agreement", "created", "machine"):
                document.pop(key, None)
            found[name] = document
        else:
            found[name] = path.read_bytes()
    return found


@pytest.fixture(scope="module")
def finished(lm: WinaLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grid")
    measure(lm, folder)
    return folder


def test_cells_hold_what_the_format_says(finished: Path, lm: WinaLM) -> None:
    index = json.loads((finished / "grid.json").read_text())
    assert index["methods"] == ["dense", "teal", "wina/selector=relative"]
    assert (index["sparsities"], index["tasks"]) == ([0.4, 0.5], list(OWN))
    assert len(index["cells"]) == 5 * 3
    assert index["model"]["parameters"] == sum(p.numel() for p in lm.model.parameters())
    for entry in index["cells"]:
        cell = read_cell(finished / "cells" / f"{entry['key']}.json")
        assert cell is not None
        assert {key: cell[key] for key in entry} == entry
        assert cell["primary"] in cell["metrics"]
        assert all(len(row) == cell["documents"] for row in cell["rows"].values())
        assert cell["identity"]["limit"] == 2
        if entry["method"] == "dense":
            assert cell["agreement"] is cell["realised"] is None
            assert "protocol" not in cell["identity"]
        else:
            assert cell["agreement"]["kl"] > 0
            assert 0 < cell["agreement"]["top1"] <= 1
            assert cell["realised"]["overall"] == pytest.approx(entry["sparsity"], abs=0.1)
            assert cell["identity"]["config"]["prefill"] == cell["identity"]["protocol"] == "all"
    assert not is_patched(lm.model)


def test_two_runs_give_the_same_numbers(lm: WinaLM, finished: Path, tmp_path: Path) -> None:
    measure(lm, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(finished)


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def test_nothing_is_measured_twice(
    lm: WinaLM, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(GridRun, "_measure", refuse)
    monkeypatch.setattr(grid_module, "calibrate", refuse)
    cells = measure(lm, copied)
    assert [cell["method"] for cell in cells[:4]] == ["dense", "dense", "dense", "teal"]
    with pytest.raises(AssertionError, match="measured again"):
        measure(lm, copied, own_grid(limit=3))


def test_a_plan_is_used_again_and_a_damaged_one_made_anew(
    lm: WinaLM, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    calibrate = grid_module.calibrate
    monkeypatch.setattr(grid_module, "calibrate", lambda *a: calls.append(a) or calibrate(*a))
    before = contents(copied)
    for cell in (copied / "cells").glob("*.json"):
        cell.unlink()
    plans = sorted((copied / "plans").iterdir())
    (plans[0] / "plan.json").write_text("{")
    measure(lm, copied)
    assert len(calls) == 1
    assert contents(copied) == before


def _child(lm: WinaLM, folder: Path) -> None:
    torch.set_num_threads(1)
    # A bar's lock is shared with the parent: it would wait forever for a child killed inside it.
    tqdm.set_lock(threading.RLock())
    measure(lm, folder)


def test_killed_at_any_moment_and_restarted(lm: WinaLM, finished: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    moments = random.Random(0)
    kills = 0
    for _ in range(60):
        child = context.Process(target=_child, args=(lm, tmp_path))
        child.start()
        child.join(moments.uniform(0.02, 0.35))
        if child.exitcode == 0:
            break
        kills += 1
        child.kill()
        child.join()
    assert kills >= 3
    # What a kill in the middle of a write leaves behind.
    (tmp_path / "cells" / ".0123.json.abc.partial").write_text("{")
    child = context.Process(target=_child, args=(lm, tmp_path))
    child.start()
    child.join(120)
    assert child.exitcode == 0
    assert contents(tmp_path) == contents(finished)


def test_other_settings_are_other_cells(lm: WinaLM, tmp_path: Path) -> None:
    def keys(grid: Grid, model: WinaLM = lm) -> set[str]:
        run = GridRun(model, grid, tmp_path, show_progress=False)
        return {run._path(c, n).stem for c in grid.columns for n in grid.tasks}

    first = keys(own_grid())
    assert len(first) == 15
    for other in (own_grid(limit=3), own_grid(seed=1), own_grid(window=32)):
        assert not first & keys(other)
    same = own_grid()
    half = Grid(
        columns_of(["teal"], [0.4], COMMON | {"prefill": "last:0.5"}), same.tasks, "last:0.5",
        same.settings, 100,
    )  # fmt: skip
    assert len(keys(half) & first) == 3, "the dense cells know no protocol"
    changed = WinaLM(tiny_model("llama", seed=1), tokenizer=tiny_tokenizer(), max_length=512)
    assert not first & keys(own_grid(), changed)


def test_an_altered_cell_is_refused(lm: WinaLM, tmp_path: Path) -> None:
    grid = own_grid(("perplexity",))
    measure(lm, tmp_path, grid)
    path = next((tmp_path / "cells").iterdir())
    cell = json.loads(path.read_text())
    cell["identity"]["limit"] = 5
    path.write_text(json.dumps(cell))
    with pytest.raises(WinaError, match="was altered"):
        measure(lm, tmp_path, grid)
    path.write_text("{")
    with pytest.raises(WinaError, match="Remove it to measure it again"):
        measure(lm, tmp_path, grid)


def test_columns() -> None:
    columns = columns_of(["dense", "wina", "teal/mask=group/seed=3"], [0.4], COMMON)
    assert [(c.label, c.sparsity) for c in columns] == [
        ("dense", 0.0), ("wina", 0.4), ("teal/mask=group/seed=3", 0.4),
    ]  # fmt: skip
    assert columns[0] == Column("dense", 0.0, None)
    config = columns[2].config
    assert config is not None
    assert (config.mask, config.seed, config.window) == ("group", 3, 128)
    with pytest.raises(UnknownNameError, match="Did you mean 'wina'"):
        columns_of(["winna"], [0.5], {})
    for pairs, message in ((["size=3"], "with a field of"), (["seed=x"], "such as 0")):
        with pytest.raises(ConfigError, match=message):
            parse_settings(pairs)


# Tasks of lm-eval, on small local files.

DOCUMENTS: Mapping[str, Callable[[int], dict[str, Any]]] = {
    "piqa_validation.jsonl": lambda i: {
        "goal": f"count to {i}", "sol1": f"say {i}", "sol2": "say nothing at all", "label": i % 2,
    },
    "lambada_openai_test.jsonl": lambda i: {"text": f"the number after {i} is {i + 1}"},
    "gsm8k_train_fewshot.jsonl": lambda i: {"question": f"{i}+1?", "answer": f"#### {i + 1}"},
    "gsm8k_test.jsonl": lambda i: {"question": f"{i}+2?", "answer": f"#### {i + 2}"},
    "wikitext2_validation_pages.jsonl": lambda i: {"page": f" = Page {i} = \n Some words . \n"},
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, row in DOCUMENTS.items():
        rows = [json.dumps(row(i)) for i in range(8)]
        (folder / name).write_text("\n".join(rows), encoding="utf-8")
    return folder


def test_lm_eval_tasks_on_local_files(lm: WinaLM, data: Path, tmp_path: Path) -> None:
    names = ["piqa@5", "lambada_openai", "gsm8k"]
    settings = Settings(limit=3, num_fewshot=1)
    with open_tasks(names, data) as tasks:
        grid = Grid(columns_of(["wina"], [0.5], COMMON), tasks, "all", settings, 200)
        cells = measure(lm, tmp_path, grid)
    assert [cell["documents"] for cell in cells] == [5, 3, 3] * 2
    by_task = {cell["task"]: cell for cell in cells if cell["method"] == "wina"}
    assert by_task["piqa@5"]["primary"] == "acc_norm"
    assert by_task["gsm8k"]["primary"] == "exact_match,flexible-extract"
    assert by_task["gsm8k"]["samples"][0]["prompt"].count("Question:") == 2
    assert by_task["lambada_openai"]["metrics"]["perplexity"]["higher_is_better"] is False
    for cell in by_task.values():
        assert set(cell["rows"]) == set(cell["metrics"])
        assert cell["agreement"]["tokens"] > 20
        assert 0.3 < cell["realised"]["overall"] < 0.7
    acc = by_task["piqa@5"]["metrics"]["acc"]["value"]
    assert acc == pytest.approx(sum(by_task["piqa@5"]["rows"]["acc"]) / 5)
    assert {row["task"] for row in rows_of(cells)} == set(names)


def test_local_table_names_definitions_that_lm_eval_has() -> None:
    import lm_eval.tasks

    stock = Path(lm_eval.tasks.__file__).parent
    for task in local_tasks().values():
        for path, files in task.parts().values():
            assert (stock / path).is_file(), path
            assert files
            assert not any(Path(name).is_absolute() for name in files.values())


def test_wrong_tasks_say_what_to_do(data: Path) -> None:
    for names, message in (
        ([], "no tasks"), (["piqa", "piqa"], "named twice"),
        (["boolq"], "boolq_validation.jsonl.gz in --data"), (["needle:x"], "needle:1024"),
        (["piqa@0"], "after @ comes a number"), (["piqa@"], "after @ comes a number"),
    ):  # fmt: skip
        with pytest.raises(WinaError, match=message), open_tasks(names, data):
            pass
    from lm_eval.tasks import TaskManager

    with pytest.raises(WinaError, match="unknown task 'piqua'"):
        HarnessTask("piqua", TaskManager(include_defaults=False))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, lm: WinaLM) -> str:
    path = tmp_path_factory.mktemp("model")
    model: Any = lm.model
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


def invoke(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    last: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return last


def test_command_lines(folder: str, data: Path, tmp_path: Path) -> None:
    ran = invoke(
        "eval", "--model", folder, "--methods", "teal", "--sparsities", "0.5", "--tasks",
        "piqa,perplexity", "--data", str(data), "--limit", "2", "--set",
        "calibration_tokens=1024,window=128", "--output", str(tmp_path), "--max-length", "256",
    )  # fmt: skip
    assert [(r["method"], r["task"]) for r in ran["rows"]] == [
        ("dense", "piqa"), ("dense", "perplexity"), ("teal", "piqa"), ("teal", "perplexity"),
    ]  # fmt: skip
    checked = invoke(
        "eval", "verify", "--model", folder, "--tasks", "piqa,lambada_openai", "--data", str(data),
        "--limit", "4", "--batch-size", "2", "--max-length", "256",
    )  # fmt: skip
    assert checked["equal"] is True
    assert len(checked["rows"]) >= 7
    assert "Usage" in CliRunner().invoke(app, ["eval"]).stdout
    for command in ("verify", "ppl", "--help"):
        assert "Usage" in CliRunner().invoke(app, ["eval", command, "--help"]).stdout


def test_arguments_are_handed_to_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: seen.append(sys.argv))
    monkeypatch.setattr("sys.argv", ["wina"])
    CliRunner().invoke(app, ["eval", "lm", "--model", "wina", "--help"], catch_exceptions=False)
    assert seen == [["wina eval lm", "--model", "wina", "--help"]]
    from lm_eval.api.registry import get_model

    assert get_model("wina") is WinaLM


@pytest.mark.slow  # lm-eval reads all its definitions
def test_lm_evals_own_command_line_knows_the_model(
    folder: str, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wina.eval.local_tasks import write_tasks

    write_tasks([local_tasks()["piqa"]], data, tmp_path)
    monkeypatch.setattr("sys.argv", ["wina"])
    result = CliRunner().invoke(
        app,
        ["eval", "lm", "run", "--model", "wina", "--model_args",
         f"pretrained={folder},sparsity=0.4,calibration_tokens=1024,window=128",
         "--tasks", "local_piqa", "--include_path", str(tmp_path), "--limit", "2"],
        catch_exceptions=False,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "local_piqa" in result.stdout


@pytest.mark.slow
@pytest.mark.skipif(
    not (
        Path(os.environ.get("WINA_EVAL_DATA", "../shared/data")) / "piqa_validation.jsonl"
    ).exists(),
    reason="no local data: set WINA_EVAL_DATA to a folder with the files of eval/tasks/local.yaml",
)
@pytest.mark.parametrize("name", list(local_tasks()))
def test_every_local_task_runs_on_real_data(lm: WinaLM, name: str) -> None:
    data = Path(os.environ.get("WINA_EVAL_DATA", "../shared/data"))
    with open_tasks([name], data) as tasks:
        task = tasks[name]
        assert isinstance(task, HarnessTask)
        found = task.measure(Trial(lm, Settings(limit=2)))
    assert found.primary == local_tasks()[name].primary
    assert found.texts
    assert all(isinstance(module, nn.Module) for module in lm.model.modules())
