"""TEAL's block-wise greedy allocation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
    ``step`` is that of the block's first projection. The steps of a block are one path for all
    budgets, as in TEAL's look-up tables; the last step of a budget is taken in part.

    Args:
        step: 0.05 in TEAL, 0.025 in WINA.
        tokens: calibration tokens to use; the last quarter of each window is compared.
        most: upper bound of each projection's sparsity.
    """

    needs = Needs.ACTIVATIONS
    by_block = True

    def __init__(self, step: float = 0.05, tokens: float = 256, most: float = 0.95) -> None:
        self.step = share("step", step)
        self.tokens = whole("tokens", tokens)
        self.most = share("most", most)

    def allocate(self, problem: Problem) -> Mapping[str, float]:
        """Every block by itself, with the budget of the model."""
        paths = problem.measured(
            lambda: self._paths(problem), policy="greedy", step=self.step, tokens=self.tokens,
            most=self.most, reach=problem.reach,
        )  # fmt: skip
        weights = {unit.name: unit.weights for unit in problem.units}
        found = dict.fromkeys(weights, 0.0)
        for path in paths:
            left = problem.sparsity * sum(weights[name] for name in path["units"])
            for name, size in path["steps"]:
                found[name] += min(size, left) / weights[name]
                left -= min(size, left)
        return found

    def _paths(self, problem: Problem) -> list[dict[str, Any]]:
        """The steps (unit, weights) of every block, up to the highest budget."""
        paths: list[dict[str, Any]] = []

        def visit(block: Block) -> None:
            names = [unit.name for unit in block.units]
            paths.append({"units": names, "steps": self._steps(block, problem.reach)})

        visit_blocks(problem, problem.tokens(self.tokens), visit, "greedy allocation of blocks")
        return paths

    def _steps(self, block: Block, budget: float) -> list[tuple[str, float]]:
        state = {unit.name: 0.0 for unit in block.units}
        steps: list[tuple[str, float]] = []
        size = self.step * block.units[0].weights
        left = budget * block.weights
        while left > 1e-9 * block.weights:
            trials = []
            for unit in block.units:
                room = (self.most - state[unit.name]) * unit.weights
                # A small projection has little room left at its end: it takes what there is.
                weights = min(size, room)
                if weights > 1e-9 * unit.weights:
                    tried = {**state, unit.name: state[unit.name] + weights / unit.weights}
                    trials.append((block.error(tried, _LAST), unit.name, weights, tried))
            if not trials:
                raise ConfigError(
                    f"a sparsity of {budget:g} is out of reach with at most {self.most:g} in each "
                    "projection"
                )
            _, name, weights, state = min(trials, key=lambda trial: trial[0])
            steps.append((name, weights))
            left -= weights
            block.settle(state)
        return steps
