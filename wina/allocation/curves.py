"""Sensitivity curves, and the cheapest way to spend a budget of bytes over them.

Knows nothing of models: a curve says how much loss a unit adds at each sparsity.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from wina.errors import ConfigError

Point = tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """Estimated loss increase of one unit over its sparsity.

    Attributes:
        name: of the unit.
        weights: its number of weights.
        points: (sparsity, loss increase) in increasing sparsity, from sparsity 0 on.
    """

    name: str
    weights: int
    points: Sequence[Point]

    def hull(self, most: float = 1.0) -> list[Point]:
        """The corners of the greatest convex function below the curve made non-decreasing.

        The curve is cut at ``most`` first (interpolated). Between two corners the straight line
        is never dearer than the curve.
        """
        corners: list[Point] = []
        highest = -float("inf")
        for sparsity, loss in up_to(self.points, most):
            highest = max(highest, loss)
            point = (sparsity, highest)
            while len(corners) > 1 and _slope(*corners[-2:]) >= _slope(corners[-1], point):
                corners.pop()
            corners.append(point)
        return corners


def spend(curves: Sequence[Curve], sparsity: float, most: float = 1.0) -> dict[str, float]:
    """Sparsity of each curve's unit with the least total loss on the convex hulls.

    Takes the steps between the hulls' corners in order of their marginal loss per weight until
    the budget is used; the last step is taken in part. Convexity makes this the optimum.

    Args:
        curves: one for each unit.
        sparsity: the budget: mean of the sparsities, weighted by the curves' weights.
        most: upper bound of each sparsity.

    Returns:
        Unit name → sparsity; their weighted mean is ``sparsity`` to rounding.

    Raises:
        ConfigError: the budget exceeds what the bound or the curves allow.
    """
    steps = []
    for index, curve in enumerate(curves):
        for low, high in pairwise(curve.hull(most)):
            steps.append((_slope(low, high) / curve.weights, index, low[0], high[0]))
    found = {curve.name: 0.0 for curve in curves}
    total = sum(curve.weights for curve in curves)
    left = sparsity * total
    for _, index, begin, end in sorted(steps):
        curve = curves[index]
        size = (end - begin) * curve.weights
        if size >= left:
            found[curve.name] = begin + left / curve.weights
            return found
        found[curve.name] = end
        left -= size
    if left > 1e-9 * total:
        raise ConfigError(
            f"a sparsity of {sparsity:g} is out of reach: with at most {most:g} in each "
            f"projection the model gets to {sparsity - left / total:.4g}"
        )
    return found


def up_to(points: Sequence[Point], most: float) -> list[Point]:
    """The points of a piecewise linear function up to ``most``, interpolated there."""
    end = bisect_left([sparsity for sparsity, _ in points], most)
    if end >= len(points):
        return list(points)
    if end == 0 or points[end][0] == most:
        return list(points[: end + 1])
    low, high = points[end - 1], points[end]
    return [*points[:end], (most, low[1] + (most - low[0]) * _slope(low, high))]


def _slope(low: Point, high: Point) -> float:
    return (high[1] - low[1]) / (high[0] - low[0])
