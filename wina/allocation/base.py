"""What an allocation policy is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from wina.projections import Projection
from wina.registry import Registry


class Allocation(ABC):
    """Spends a budget of weight bytes over the projections of a model."""

    @abstractmethod
    def allocate(self, projections: Sequence[Projection], sparsity: float) -> Mapping[str, float]:
        """Sparsity of each projection, by name.

        The mean over projections, weighted by their K·N, equals ``sparsity``: the share of
        projection weights that a decoded token does not read.
        """


ALLOCATIONS: Registry[type[Allocation]] = Registry("allocation")
