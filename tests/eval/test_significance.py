from __future__ import annotations

import math
from fractions import Fraction
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wina.eval.report.significance import compare, holm, mcnemar, paired_t, z_test

BITS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=60)


def pairs(gained: int, lost: int, same: int = 3) -> tuple[list[float], list[float]]:
    """Right-or-wrong values of two runs with that many discordant documents."""
    return [1.0] * (gained + same) + [0.0] * lost, [0.0] * gained + [1.0] * (same + lost)


@pytest.mark.parametrize(
    ("gained", "lost", "p"),
    [
        (0, 0, Fraction(1)),
        (1, 0, Fraction(1)),
        (5, 0, Fraction(1, 16)),
        (0, 8, Fraction(1, 128)),
        (2, 8, Fraction(2 * sum(comb(10, k) for k in range(3)), 2**10)),  # by hand: 0.109375
    ],
)
def test_mcnemar_is_the_exact_binomial(gained: int, lost: int, p: Fraction) -> None:
    assert mcnemar(*map(np.array, pairs(gained, lost))) == pytest.approx(float(p))


@given(BITS)
def test_mcnemar_is_symmetric_and_ignores_agreement(rows: list[tuple[bool, bool]]) -> None:
    a, b = (np.array(column, float) for column in zip(*rows, strict=True))
    p = mcnemar(a, b)
    assert 0 < p <= 1
    assert p == pytest.approx(mcnemar(b, a))
    assert p == pytest.approx(mcnemar(np.append(a, [1, 0]), np.append(b, [1, 0])))


def test_paired_t_against_a_textbook() -> None:
    """Student's sleep data (1908): t = −4.0621 on 9 degrees of freedom, p = 0.002833."""
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    assert paired_t(first, second) == pytest.approx(0.00283289, rel=1e-5)
    found = compare(first, second, float(np.mean(first)), float(np.mean(second)))
    assert found is not None
    assert (found.test, found.documents) == ("paired t", 10)
    assert found.stderr == pytest.approx(1.58 / 4.0621, rel=1e-4)


def test_constant_differences() -> None:
    assert paired_t([1.5, 2.5], [1.5, 2.5]) == 1.0
    assert paired_t([1.5, 2.5, 7.5], [1.0, 2.0, 7.0]) == 0.0
    assert z_test(0.0, 0.0) == 1.0
    assert z_test(0.1, 0.0) == 0.0
    assert z_test(-1.959964, 1.0) == pytest.approx(0.05)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, None, 0.03]) == [0.03, 0.06, None, 0.06]
    assert holm([0.9, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.none() | st.floats(0, 1), max_size=20))
def test_holm_keeps_order_and_bounds(values: list[float | None]) -> None:
    corrected = holm(values)
    tested = [(p, c) for p, c in zip(values, corrected, strict=True) if p is not None]
    assert [c is None for c in corrected] == [p is None for p in values]
    for p, c in tested:
        assert p <= c <= min(1.0, p * len(tested))
    assert [c for _, c in sorted(tested)] == sorted(c for _, c in tested)


@pytest.mark.parametrize("sign", [1, -1])
def test_stderr_is_in_the_unit_of_the_metric(sign: int) -> None:
    """exp of the rows' mean: differences of perplexities by the delta method."""
    generator = np.random.default_rng(0)
    a = sign * (3 + 0.1 * generator.normal(size=400))
    b = a + sign * 0.01 * generator.normal(size=400)
    ppl = [math.exp(sign * rows.mean()) for rows in (a, b)]
    found = compare(a.tolist(), b.tolist(), *ppl)
    assert found is not None
    expected = math.exp(3) * np.std(a - b, ddof=1) / 20
    assert found.stderr == pytest.approx(expected, rel=0.03)
    assert found.p == pytest.approx(paired_t(a, b))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ([1.0], [0.0]),  # one pair has no spread
        ([1.0, 0.0], [1.0, 0.0, 1.0]),  # other documents
        ([1.0, float("nan")], [1.0, 0.0]),
        ([], []),
    ],
)
def test_no_test_where_none_is_honest(a: list[float], b: list[float]) -> None:
    mean_a, mean_b = (sum(rows) / max(1, len(rows)) for rows in (a, b))
    assert compare(a, b, mean_a, mean_b) is None


def test_rows_must_average_to_the_metric() -> None:
    assert compare([1.0, 0.0, 1.0, 1.0], [1.0, 0.0, 0.0, 1.0], 0.75, 0.5) is not None
    assert compare([1.0, 0.0, 1.0, 1.0], [1.0, 0.0, 0.0, 1.0], 0.33, 0.5) is None
