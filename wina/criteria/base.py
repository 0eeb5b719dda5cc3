"""What a criterion is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Generator, Tensor

from wina.registry import Registry


class Criterion(ABC):
    """Per-channel constants c of the score |x_j|·c_j."""

    @abstractmethod
    def constants(self, weights: Sequence[Tensor], generator: Generator) -> Tensor:
        """The constants of one mask.

        Args:
            weights: the matrices [N_i, K] that this mask serves: one projection, or all of a
                projection group when they share a mask (then as if stacked along N).
            generator: seeded source of randomness on the CPU; the same in every run.

        Returns:
            c [K], float32, ≥ 0, on the device of the weights. 0 drops a channel always.
        """


CRITERIA: Registry[type[Criterion]] = Registry("criterion")
