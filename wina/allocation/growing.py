"""Block budgets from the sensitivity of whole blocks, never falling with depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from wina.allocation.base import ALLOCATIONS, Allocation, Problem
from wina.allocation.blocks import Block, visit_blocks
from wina.allocation.curves import Curve, spend
from wina.allocation.fisher import sparsity_grid
from wina.needs import Needs
from wina.registry import share, whole


@ALLOCATIONS.register("growing")
class Growing(Allocation):
    """One sparsity for each block, growing with depth, as WAS has it (EMNLP 2025 main 57).

    WAS searches for the budgets; here they come from ‖Y − Ŷ‖₂²/‖Y‖₂² of the output of each block
    with all its projections at one sparsity. The cheapest division is then made non-decreasing by
    isotonic regression, which keeps the total: an error made early is passed on by all that
    follows.

    Args:
        most: upper bound of each block's sparsity.
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
        """A curve for each block, solved over all blocks, then made to grow."""
        curves = problem.curves(
            lambda: self._curves(problem),
            policy="growing", step=self.step, most=self.most, tokens=self.tokens,
        )  # fmt: skip
        blocks: dict[str, list[str]] = {curve.name: [] for curve in curves}
        for unit in problem.units:
            blocks[str(unit.projections[0].block)].append(unit.name)
        budgets = spend(curves, problem.sparsity, self.most)
        growing = non_decreasing(
            [budgets[curve.name] for curve in curves], [curve.weights for curve in curves]
        )
        return {
            name: budget
            for names, budget in zip(blocks.values(), growing, strict=True)
            for name in names
        }

    def _curves(self, problem: Problem) -> list[Curve]:
        """A curve for each block, named by its number."""
        curves: list[Curve] = []
        grid = sparsity_grid(self.step, self.most)

        def visit(block: Block) -> None:
            names = [unit.name for unit in block.units]
            errors = block.relative_errors(dict.fromkeys(names, s) for s in grid)
            points = [(0.0, 0.0), *zip(grid, errors, strict=True)]
            number = block.units[0].projections[0].block
            curves.append(Curve(str(number), block.weights, points))

        visit_blocks(problem, problem.tokens(self.tokens), visit, "output error of blocks")
        return curves


def non_decreasing(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The non-decreasing sequence nearest in weighted squares; its weighted mean is the same.

    Neighbours in the wrong order are pooled at their mean (isotonic regression).
    """
    pools: list[tuple[float, float, int]] = []
    for value, weight in zip(values, weights, strict=True):
        pool = (value, float(weight), 1)
        while pools and pools[-1][0] > pool[0]:
            mean, mass, count = pools.pop()
            both = mass + pool[1]
            pool = ((mean * mass + pool[0] * pool[1]) / both, both, count + pool[2])
        pools.append(pool)
    return [mean for mean, _, count in pools for _ in range(count)]
