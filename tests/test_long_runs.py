"""Ten thousand tokens and a thousand patches: memory is flat and nothing drifts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("long_run.py")


@pytest.mark.parametrize(
    ("tokens", "cycles", "growth"),
    [
        (400, 20, 0.05),
        pytest.param(10_000, 1_000, 0.01, marks=pytest.mark.slow),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="reads resident memory from /proc")
def test_memory_is_flat_and_nothing_drifts(tokens: int, cycles: int, growth: float) -> None:
    answer = subprocess.run(
        [sys.executable, str(SCRIPT), "--tokens", str(tokens), "--cycles", str(cycles)],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(answer.stdout.splitlines()[-1])
    assert max(found["growth"]) < growth, found
    assert found["every_text_equal"]
    assert len(found["growth"]) == 3
    assert found["restored_bit_for_bit"]
    assert found["dense_again_after_sparsity_0"]
    assert found["largest_difference_of_logits_at_sparsity_0"] < 1e-4
