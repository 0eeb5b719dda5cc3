"""|x_j|: the magnitude of the hidden state alone (TEAL)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from wina.criteria.base import CRITERIA, Criterion


@CRITERIA.register("magnitude")
class Magnitude(Criterion):
    """c_j = 1. TEAL, arXiv 2408.14690, Section 4."""

    def constants(self, weights: Sequence[Tensor], generator: Generator) -> Tensor:
        """Ones [K]."""
        first = weights[0]
        return torch.ones(first.shape[1], dtype=torch.float32, device=first.device)
