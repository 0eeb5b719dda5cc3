"""Libraries compiled for one test run, and the process that calls every operator."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DRIVER = HERE / "operator_calls.py"


def drive(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``operator_calls.py``; its last line of stdout is JSON if it came to its end."""
    # Threads that spin while they wait would take the cores from each other.
    env = {**os.environ, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE", **environment}
    return subprocess.run(
        [sys.executable, str(DRIVER), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=env,
    )


def said(answer: subprocess.CompletedProcess[str]) -> Mapping[str, Any]:
    """What a run that went well printed."""
    assert answer.returncode == 0, f"{answer.returncode}\n{answer.stdout}\n{answer.stderr[-6000:]}"
    result: Mapping[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return result
