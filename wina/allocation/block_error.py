"""Global allocation from the measured error of each block's output."""

from __future__ import annotations

from collections.abc import Mapping

from wina.allocation.base import ALLOCATIONS, Allocation, Problem
from wina.allocation.blocks import Block, visit_blocks
from wina.allocation.curves import Curve, spend
from wina.allocation.fisher import sparsity_grid
from wina.needs import Needs
from wina.registry import share, whole


@ALLOCATIONS.register("block-error")
class BlockError(Allocation):
    """Sparsity where it changes the output of a decoder block least, over all projections.

    A curve is ‖Y − Ŷ‖₂²/‖Y‖₂² of the block's output with one unit sparse: squared errors of
    independent causes add up, and blocks whose outputs are large become comparable.

    Args:
        most: upper bound of each projection's sparsity.
        step: of the grid of sparsities.
        tokens: calibration tokens to use.
    """

    needs = Needs.ACTIVATIONS
    by_block = True

    def __init__(self, most: float = 0.95, step: float = 0.1, tokens: float = 1024) -> None:
        self.most = share("most", most)
        self.step = share("step", step)
        self.tokens = whole("tokens", tokens)

    def allocate(self, problem: Problem) -> Mapping[str, float]:
        """Measure every curve, then solve over all of them."""
        curves = problem.curves(
            lambda: self._curves(problem),
            policy="block-error", step=self.step, most=self.most, tokens=self.tokens,
        )  # fmt: skip
        return spend(curves, problem.sparsity, self.most)

    def _curves(self, problem: Problem) -> list[Curve]:
        curves: list[Curve] = []
        grid = sparsity_grid(self.step, self.most)

        def visit(block: Block) -> None:
            dense = {unit.name: 0.0 for unit in block.units}
            for unit in block.units:
                errors = block.relative_errors({**dense, unit.name: s} for s in grid)
                points = [(0.0, 0.0), *zip(grid, errors, strict=True)]
                curves.append(Curve(unit.name, unit.weights, points))

        visit_blocks(problem, problem.tokens(self.tokens), visit, "output error of blocks")
        return curves
