"""TEAL's block-wise greedy allocation."""

from __future__ import annotations

from collections.abc import Mapping

from wina.allocation.base import ALLOCATIONS, Allocation, Problem
from wina.allocation.blocks import Block, visit_blocks
from wina.errors import ConfigError
from wina.needs import Needs
from wina.registry import share, whole

# Where in a window the error is measured.
_LAST = 0.25


@ALLOCATIONS.register("greedy")
class Greedy(Allocation):
    """The same total in every block, divided inside it step by step (arXiv 2408.14690, Alg. 1).

    All projections start dense. Again and again each is tried one step sparser, and the one whose
    step gives the least ‖Y − Ŷ‖₂ of the block's output keeps it, until the block has dropped its
    share of weights. A step is smaller for a larger projection, so that all drop as many weights:
    ``step`` is that of the block's first projection. The last step is taken in part.

    Args:
        step: 0.05 in TEAL, 0.025 in WINA.
        tokens: calibration tokens to use; the last quarter of each window is compared.
        most: upper bound of each projection's sparsity.
    """

    needs = Needs.ACTIVATIONS

    def __init__(self, step: float = 0.05, tokens: float = 256, most: float = 0.95) -> None:
        self.step = share("step", step)
        self.tokens = whole("tokens", tokens)
        self.most = share("most", most)

    def allocate(self, problem: Problem) -> Mapping[str, float]:
        """Every block by itself, with the budget of the model."""
        found: dict[str, float] = {}

        def visit(block: Block) -> None:
            found.update(self._block(block, problem.sparsity))

        visit_blocks(problem, problem.tokens(self.tokens), visit, "greedy allocation of blocks")
        return found

    def _block(self, block: Block, budget: float) -> dict[str, float]:
        state = {unit.name: 0.0 for unit in block.units}
        size = self.step * block.units[0].weights
        left = budget * block.weights
        while left > 1e-9 * block.weights:
            trials = []
            for unit in block.units:
                room = (self.most - state[unit.name]) * unit.weights
                # A small projection has little room left at its end: it takes what there is.
                weights = min(size, room, left)
                if weights > 1e-9 * unit.weights:
                    tried = {**state, unit.name: state[unit.name] + weights / unit.weights}
                    trials.append((block.error(tried, _LAST), weights, tried))
            if not trials:
                raise ConfigError(
                    f"a sparsity of {budget:g} is out of reach with at most {self.most:g} in each "
                    "projection"
                )
            _, weights, state = min(trials, key=lambda trial: trial[0])
            left -= weights
            block.settle(state)
        return state
