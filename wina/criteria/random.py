"""Random channels: the baseline that every method must beat."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from wina.criteria.base import CRITERIA, Criterion


@CRITERIA.register("random")
class Random(Criterion):
    """c_j = 10^u, u uniform on [−12, 12]: the constant outweighs |x_j|, so chance decides."""

    def constants(self, weights: Sequence[Tensor], generator: Generator) -> Tensor:
        """Random constants [K] over 24 orders of magnitude."""
        first = weights[0]
        exponent = torch.rand(first.shape[1], generator=generator, dtype=torch.float32) * 24 - 12
        return torch.pow(10.0, exponent).to(first.device)
