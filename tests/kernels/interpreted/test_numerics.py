"""What docs/numerics.md says of Triton's kernels."""

from __future__ import annotations

import pytest
from numerics_claims import assert_as_documented

from wina.bench import numerics


@pytest.mark.parametrize("case", numerics.CASES)
def test_errors_are_as_documented(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    numerics.interpret()
    monkeypatch.setattr(numerics, "K", 70)
    monkeypatch.setattr(numerics, "N", 33)
    assert_as_documented(numerics.measure(["triton"], [case], seed=1))
