"""The same sparsity everywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from wina.allocation.base import ALLOCATIONS, Allocation
from wina.projections import Projection


@ALLOCATIONS.register("uniform")
class Uniform(Allocation):
    """Every projection drops the same share of its channels."""

    def allocate(self, projections: Sequence[Projection], sparsity: float) -> Mapping[str, float]:
        """``sparsity`` for every projection."""
        return {projection.name: sparsity for projection in projections}
