"""lm-eval's model ``vllm`` on a sparse folder, beside our harness (``make test-vllm``)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM lives in an environment of its own: make test-vllm")

from vllm_model import make_folder

pytestmark = pytest.mark.vllm

DOCUMENTS = 6


def command(*arguments: object) -> dict[str, Any]:
    """The JSON line of ``wina eval``; in a process of its own, which an engine wants."""
    settings = {"VLLM_NO_USAGE_STATS": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(
        [sys.executable, "-m", "wina", "eval", *map(str, arguments)],
        capture_output=True, text=True, env=os.environ | settings, check=False,
    )  # fmt: skip
    assert answer.stdout, answer.stderr[-3000:]
    found: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return found


def test_continuations_score_in_vllm_as_with_us(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", 0.5)
    rows = [
        {
            "goal": f"count to {i}",
            "sol1": f"say {i} and no more",
            "sol2": "be still",
            "label": i % 2,
        }
        for i in range(DOCUMENTS)
    ]
    text = "\n".join(map(json.dumps, rows))
    (tmp_path / "piqa_validation.jsonl").write_text(text, encoding="utf-8")
    found = command(
        "vllm", "--model", folder, "--data", tmp_path, "--tasks", "piqa", "--max-length", 128
    )
    assert {row["metric"] for row in found["rows"]} == {"acc", "acc_norm"}
    for row in found["rows"]:
        assert row["documents"] == DOCUMENTS
        assert 0.4 < row["realised"] < 0.6
        assert row["median_dlogp"] <= 1e-4
        assert 0 < row["rounding_dlogp"] <= 1e-4
        assert abs(row["difference"]) <= row["stderr"]
