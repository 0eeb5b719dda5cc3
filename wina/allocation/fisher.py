"""Global allocation from the loss's own sensitivity."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from wina.allocation.base import ALLOCATIONS, Allocation, Problem
from wina.allocation.curves import Curve, spend, up_to
from wina.allocation.gradients import OperatingPoint, loss_changes
from wina.needs import Needs
from wina.registry import share, whole

# Half the distance over which a slope is measured at an operating point.
_REACH = 0.05
# How far one round may scale a curve, either way.
_TRUST = 4.0


@ALLOCATIONS.register("fisher")
class Fisher(Allocation):
    """Sparsity where it costs the least loss per byte, over all projections at once.

    The first round estimates the curve ½·E[(gᵀδy)²] of every projection on a grid of sparsities
    from one backward pass of the dense model. Each further round measures the slope of
    KL(dense ‖ sparse) of every projection at the operating point found so far, and scales its
    curve to that slope.

    Args:
        rounds: 1 is dense gradients only. A second round on few tokens can make it worse: the slope
            of one projection is a mean of signed values, noisier than its curve of squares.
        most: upper bound of each projection's sparsity.
        step: of the grid of sparsities.
        tokens: calibration tokens to differentiate.
    """

    def __init__(
        self, rounds: float = 1, most: float = 0.95, step: float = 0.05, tokens: float = 8192
    ) -> None:
        self.rounds = whole("rounds", rounds)
        self.needs = Needs.GRADIENTS if rounds == 1 else Needs.EVALUATIONS
        self.most = share("most", most)
        self.step = share("step", step)
        self.tokens = whole("tokens", tokens)

    def allocate(self, problem: Problem) -> Mapping[str, float]:
        """Solve on the curves of the dense model, then on the corrected ones."""
        windows = problem.tokens(self.tokens)
        curves = problem.curves(
            lambda: self._dense_curves(problem, windows),
            policy="fisher", step=self.step, most=self.most, tokens=self.tokens,
        )  # fmt: skip
        found = spend(curves, problem.sparsity, self.most)
        for _ in range(self.rounds - 1):
            curves = self._corrected(problem, curves, found, windows)
            found = spend(curves, problem.sparsity, self.most)
        return found

    def _dense_curves(self, problem: Problem, windows: Tensor) -> list[Curve]:
        grid = sparsity_grid(self.step, self.most)
        names = problem.by_projection({unit.name: 0.0 for unit in problem.units})
        changes = loss_changes(problem, dict.fromkeys(names, grid), windows)
        curves = []
        for unit in problem.units:
            losses = sum(changes[projection.name].second for projection in unit.projections)
            assert isinstance(losses, Tensor)
            points = [(0.0, 0.0), *zip(grid, losses.tolist(), strict=True)]
            curves.append(Curve(unit.name, unit.weights, points))
        return curves

    def _corrected(
        self, problem: Problem, curves: list[Curve], found: Mapping[str, float], windows: Tensor
    ) -> list[Curve]:
        """Curves whose slope at the operating point is the one measured there."""
        here = problem.by_projection(found)
        point = OperatingPoint(here, problem.thresholds(found))
        ends = {
            unit.name: (
                max(0.0, found[unit.name] - _REACH),
                min(self.most, found[unit.name] + _REACH),
            )
            for unit in problem.units
        }
        grids = {p.name: ends[unit.name] for unit in problem.units for p in unit.projections}
        changes = loss_changes(problem, grids, windows, point)
        corrected = []
        for unit, curve in zip(problem.units, curves, strict=True):
            measured = sum(
                float(changes[projection.name].first.diff()) for projection in unit.projections
            )
            low, high = (up_to(curve.hull(self.most), end)[-1][1] for end in ends[unit.name])
            factor = min(max(measured / max(high - low, 1e-12), 1 / _TRUST), _TRUST)
            points = [(sparsity, loss * factor) for sparsity, loss in curve.points]
            corrected.append(Curve(curve.name, curve.weights, points))
        return corrected


def sparsity_grid(step: float, most: float) -> list[float]:
    """step, 2·step, … and ``most``."""
    count = math.ceil(round(most / step, 9))
    return [min(most, step * (index + 1)) for index in range(count)]
