from __future__ import annotations

import random

import pytest

from wina.bench.timing import (
    QUICK,
    STEADY,
    TOO_FEW,
    TOO_NOISY,
    Timing,
    claim,
    compare,
    interleave,
    median_interval,
    noise_warnings,
    ratio,
)


def test_ratio_is_taken_round_by_round() -> None:
    """A machine that slows down tenfold half-way changes times, not ratios."""
    slow = Timing((2.0, 2.0, 20.0, 20.0, 20.0, 2.0))
    fast = Timing((1.0, 1.0, 10.0, 10.0, 10.0, 1.0))
    found = compare(slow, fast)
    assert found.ratio == ratio(slow, fast) == 2.0
    assert (found.low, found.high, found.verdict) == (2.0, 2.0, STEADY)


def test_halves_that_disagree_make_no_claim() -> None:
    one = Timing((1.0,) * 8)
    drifting = Timing((1.0,) * 4 + (0.9,) * 4)
    found = compare(one, drifting)
    assert found.verdict == TOO_NOISY
    assert found.disagreement == pytest.approx(1 / 9)
    assert compare(one, Timing((1.0,) * 4 + (0.97,) * 4)).verdict == STEADY
    assert compare(Timing((1.0, 1.0)), Timing((1.0, 1.0))).verdict == TOO_FEW
    assert claim(found, QUICK)["verdict"] == "quick: no claim"


def test_wide_interval_makes_no_claim() -> None:
    fast = Timing((0.8, 1.2) * 10)
    found = compare(Timing((1.0,) * 20), fast)
    assert found.disagreement == 0.0
    assert found.verdict == TOO_NOISY
    assert found.uncertainty == pytest.approx((1 / 0.8 - 1 / 1.2) / 2 / found.ratio)


def test_warning_names_the_worst_row() -> None:
    rows = [
        {"backend": "cpu", "verdict": STEADY, "uncertainty": 0.01, "rounds": 9},
        {"backend": "triton", "verdict": TOO_NOISY, "uncertainty": 0.2, "rounds": 9},
    ]
    (warning,) = noise_warnings(rows, ("backend",))
    assert "1 of 2" in warning
    assert "20%" in warning
    assert "triton" in warning
    assert noise_warnings(rows[:1], ("backend",)) == []


def test_median_interval() -> None:
    assert median_interval([3.0]) == (3.0, 3.0)
    assert median_interval([1.0, 2.0, 3.0]) == (1.0, 3.0)
    assert median_interval([float(i) for i in range(15)]) == (3.0, 11.0)  # k = 4, as in tables
    rng = random.Random(0)
    covered = sum(
        low <= 0.0 <= high
        for low, high in (median_interval([rng.gauss(0, 1) for _ in range(15)]) for _ in range(400))
    )
    assert covered >= 0.93 * 400


def test_spread() -> None:
    assert Timing((1.0, 1.5)).spread == pytest.approx(0.4)
    assert Timing((1.0,) * 9).spread == 0.0


def test_interleave_warms_up_and_alternates() -> None:
    calls: list[str] = []

    def contender(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    times = interleave(
        {"a": lambda: contender("a"), "b": lambda: contender("b")}, 2, show_progress=False
    )
    assert "".join(calls) == "baabba"
    assert times["a"].seconds == (3.0, 6.0)
    timed = interleave({"c": lambda: None}, 1, show_progress=False)
    assert timed["c"].seconds[0] >= 0
