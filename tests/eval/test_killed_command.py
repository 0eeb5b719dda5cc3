"""The command itself, killed and started again: the report is that of a run in one piece."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from wina.eval.report.write import write_report
from wina.testing import tiny_model, tiny_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

_TIMES = {"created", "machine", "seconds", "seconds_with_agreement", "command"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(folder)  # type: ignore[operator]
    tiny_tokenizer().save_pretrained(folder)
    return folder


def start(model: Path, output: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "wina", "eval", "--model", str(model), "--methods", "teal,wina",
         "--sparsities", "0.4,0.5", "--tasks", "perplexity,needle:100,generation", "--limit", "4",
         "--window", "64", "--new-tokens", "12", "--set", "calibration_tokens=1024,window=128",
         "--agreement-tokens", "256", "--max-length", "256", "--output", str(output)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def until_measured(process: subprocess.Popen[str], cells: int) -> None:
    """Return when the run has said that many times that a cell is done, or has ended."""
    assert process.stderr is not None
    for line in process.stderr:
        cells -= line.startswith("[")
        if cells <= 0:
            return


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in _TIMES}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def report(folder: Path) -> Any:
    write_report(folder)
    return without_times(json.loads((folder / "report.json").read_text()))


def test_killed_three_times(model: Path, tmp_path: Path) -> None:
    whole = start(model, tmp_path / "whole")
    _, errors = whole.communicate()
    assert whole.returncode == 0, errors
    moments = random.Random(0)
    for cells in (1, 4, 4):
        process = start(model, tmp_path / "killed")
        until_measured(process, cells)
        try:
            process.wait(moments.uniform(0.0, 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
        process.communicate()
        assert process.returncode == -9
    last = start(model, tmp_path / "killed")
    _, errors = last.communicate()
    assert last.returncode == 0, errors
    assert "measured before" in errors
    assert report(tmp_path / "killed") == report(tmp_path / "whole")
