"""What docs/numerics.md says of the backends of this machine; of Triton's: interpreted/."""

from __future__ import annotations

import pytest
from numerics_claims import (
    assert_as_documented,
    assert_massive_weights_are_what_integers_round_to,
)

from wina.bench.numerics import CASES, measure
from wina.kernels import cpu


@pytest.mark.parametrize("case", CASES)
def test_errors_are_as_documented(case: str) -> None:
    assert cpu.load() is None
    assert_as_documented(measure(["reference", "cpu"], [case], seed=1))


def test_rounded_weights_cost_no_more_where_activations_are_massive() -> None:
    assert cpu.load() is None
    rows = measure(["reference", "cpu"], ["normal", "massive activations"], seed=2)
    assert_massive_weights_are_what_integers_round_to(rows)
