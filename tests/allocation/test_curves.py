"""The solver against brute force."""

from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wina.allocation.curves import Curve, spend, up_to
from wina.allocation.growing import non_decreasing
from wina.errors import ConfigError

GRID = [0.0, 0.25, 0.5, 0.75, 1.0]


@st.composite
def curves(draw: st.DrawFn, convex: bool = False) -> list[Curve]:
    found = []
    for index in range(draw(st.integers(1, 3))):
        steps = [draw(st.integers(0, 40)) / 8 for _ in GRID[1:]]
        if convex:
            steps.sort()
        losses = [sum(steps[:i]) for i in range(len(GRID))]
        points = list(zip(GRID, losses, strict=True))
        found.append(Curve(str(index), draw(st.sampled_from([64, 192, 512])), points))
    return found


def mean(found: dict[str, float], of: list[Curve]) -> float:
    total = sum(curve.weights for curve in of)
    return sum(found[curve.name] * curve.weights for curve in of) / total


def loss(found: dict[str, float], of: list[Curve]) -> float:
    return sum(up_to(curve.points, found[curve.name])[-1][1] for curve in of)


@given(curves(), st.floats(0, 0.9), st.sampled_from([0.9, 0.95, 1.0]))
def test_budget_is_met_exactly_within_bounds(of: list[Curve], budget: float, most: float) -> None:
    found = spend(of, budget, most)
    assert mean(found, of) == pytest.approx(budget, abs=1e-12)
    assert all(0.0 <= value <= most + 1e-12 for value in found.values())


@given(curves(convex=True), st.data())
def test_nothing_on_the_grid_is_cheaper(of: list[Curve], data: st.DataObject) -> None:
    choice = {curve.name: data.draw(st.sampled_from(GRID)) for curve in of}
    budget = mean(choice, of)
    best = min(
        loss(found, of)
        for values in product(GRID, repeat=len(of))
        if mean(found := {c.name: v for c, v in zip(of, values, strict=True)}, of) >= budget
    )
    assert loss(spend(of, budget), of) <= best + 1e-9


@given(curves(), st.floats(0, 0.5), st.floats(0, 0.5))
def test_a_larger_budget_takes_nothing_back(of: list[Curve], budget: float, more: float) -> None:
    small, large = spend(of, budget), spend(of, budget + more)
    assert all(small[name] <= large[name] + 1e-12 for name in small)


@given(curves())
def test_hull_is_convex_and_below_the_rising_curve(of: list[Curve]) -> None:
    for curve in of:
        hull = curve.hull()
        slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(hull)]
        assert slopes == sorted(slopes)
        assert all(slope >= 0 for slope in slopes)
        for sparsity, value in curve.points:
            assert up_to(hull, sparsity)[-1][1] <= value + 1e-9


def test_a_dip_is_measured_noise() -> None:
    noisy = Curve("a", 1, [(0.0, 0.0), (0.5, 1.0), (1.0, 0.5)])
    assert noisy.hull() == [(0.0, 0.0), (1.0, 1.0)]


def test_the_cheaper_projection_pays() -> None:
    cheap = Curve("cheap", 100, [(0.0, 0.0), (0.5, 0.1), (1.0, 1.0)])
    dear = Curve("dear", 100, [(0.0, 0.0), (0.5, 0.5), (1.0, 5.0)])
    assert spend([cheap, dear], 0.25) == {"cheap": 0.5, "dear": 0.0}
    assert spend([cheap, dear], 0.3) == pytest.approx({"cheap": 0.5, "dear": 0.1})


def test_bytes_count_not_projections() -> None:
    points = [(0.0, 0.0), (1.0, 1.0)]
    found = spend([Curve("small", 10, points), Curve("large", 90, points)], 0.9)
    assert found == {"small": 0.0, "large": 1.0}


def test_out_of_reach() -> None:
    curve = Curve("a", 1, [(0.0, 0.0), (1.0, 1.0)])
    with pytest.raises(ConfigError, match=r"0\.99 is out of reach.*gets to 0\.95"):
        spend([curve], 0.99, 0.95)


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 5)), min_size=1, max_size=8))
def test_isotonic_regression_keeps_the_total(rows: list[tuple[float, int]]) -> None:
    values, weights = [v for v, _ in rows], [float(w) for _, w in rows]
    found = non_decreasing(values, weights)
    assert all(a <= b + 1e-12 for a, b in pairwise(found))
    assert sum(map(lambda v, w: v * w, found, weights)) == pytest.approx(
        sum(map(lambda v, w: v * w, values, weights)), abs=1e-9
    )
    if values == sorted(values):
        assert found == values
