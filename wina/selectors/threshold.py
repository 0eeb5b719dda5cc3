"""One calibrated cut-off for all tokens: what is deployed."""

from __future__ import annotations

from torch import Tensor

from wina.selectors.base import SELECTORS, Selector


@SELECTORS.register("threshold")
class Threshold(Selector):
    """Keep |x_j|·c_j > τ, τ the s-quantile on calibration text (TEAL, arXiv 2408.14690)."""

    def scale(
        self, x: Tensor, threshold: Tensor, sparsity: float, probe: Tensor | None = None
    ) -> Tensor | None:
        """None: the cut-off is the same for every token, and costs nothing per token."""
        return None
