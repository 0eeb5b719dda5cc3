"""The same sparsity everywhere."""

from __future__ import annotations

from collections.abc import Mapping

from wina.allocation.base import ALLOCATIONS, Allocation, Problem


@ALLOCATIONS.register("uniform")
class Uniform(Allocation):
    """Every projection drops the same share of its channels."""

    def allocate(self, problem: Problem) -> Mapping[str, float]:
        """The budget itself, for every unit."""
        return {unit.name: problem.sparsity for unit in problem.units}
