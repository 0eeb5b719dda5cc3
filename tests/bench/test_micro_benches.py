"""The pytest-benchmark benches run, in quick mode, as ``make bench-quick`` runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_quick_mode_runs(tmp_path: Path) -> None:
    written = tmp_path / "now.json"
    # Within a worker of pytest-xdist pytest-benchmark would measure nothing.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    answer = subprocess.run(
        [sys.executable, "-m", "pytest", "bench/", "--quick", "--benchmark-only", "-q",
         "-p", "no:cacheprovider", f"--benchmark-json={written}",
         "-k", "192x576 and float32"],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stdout + answer.stderr
    benches = json.loads(written.read_text())["benchmarks"]
    assert {bench["group"] for bench in benches} >= {
        "sparse_linear 192x576 float32", "sparse_gate_up 192x576 float32",
    }  # fmt: skip
    for bench in benches:
        assert bench["extra_info"]["bytes"] <= 2 * 4 * 192 * 576
        assert bench["extra_info"]["gb_per_s"] > 0
