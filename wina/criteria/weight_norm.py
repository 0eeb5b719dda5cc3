"""|x_j|·‖W_:,j‖: the magnitude of a channel's contribution to the output."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Generator, Tensor

from wina.criteria.base import CRITERIA, Criterion
from wina.errors import ConfigError
from wina.statistics import column_norms


@CRITERIA.register("l2-norm")
class L2Norm(Criterion):
    """c_j = ‖W_:,j‖₂. WINA, arXiv 2505.19427, Equation 4."""

    def constants(self, weights: Sequence[Tensor], generator: Generator) -> Tensor:
        """Euclidean column norms [K]."""
        return column_norms(weights, 2.0)


@CRITERIA.register("l1-norm")
class L1Norm(Criterion):
    """c_j = ‖W_:,j‖₁. WAS, EMNLP 2025 main 57."""

    def constants(self, weights: Sequence[Tensor], generator: Generator) -> Tensor:
        """Sums of absolute column entries [K]."""
        return column_norms(weights, 1.0)


@CRITERIA.register("norm-power")
class NormPower(Criterion):
    """c_j = ‖W_:,j‖₂^α. WiSparse, arXiv 2602.14452; α = 0 is TEAL's score and α = 1 WINA's."""

    def __init__(self, alpha: float = 0.5) -> None:
        if not 0.0 <= alpha <= 4.0:
            raise ConfigError(f"norm-power takes an exponent between 0 and 4, not {alpha}")
        self.alpha = alpha

    def constants(self, weights: Sequence[Tensor], generator: Generator) -> Tensor:
        """Euclidean column norms to the power α [K]."""
        return column_norms(weights, 2.0).pow(self.alpha)
