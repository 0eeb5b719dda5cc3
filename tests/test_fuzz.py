"""A short run of the fuzzer: whatever is damaged is refused by an error of wina's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FUZZER = HERE / "fuzz" / "run.py"


def fuzz(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, sys.path), str(HERE)])}
    return subprocess.run(
        [sys.executable, str(FUZZER), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )


@pytest.mark.skipif(sys.platform != "linux", reason="reads the size of the process from /proc")
def test_damaged_inputs_are_refused() -> None:
    answer = fuzz("--inputs", "1000")
    assert answer.returncode == 0, answer.stdout[-3000:]
    result = json.loads(answer.stdout.splitlines()[-1])
    assert result["total"] >= 990
    often = [target for target, count in result["inputs"].items() if count >= 20]
    assert len(often) >= 5
    assert all(result["refused"].get(target) for target in often)
    assert result["findings"] == []
