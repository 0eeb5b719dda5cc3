"""What a selector is."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from wina.registry import Registry
from wina.statistics import ScoreHistogram


class Selector(ABC):
    """Chooses the cut-off of the scores |x_j|·c_j.

    With t_j = cutoff/c_j a channel is kept iff not |x_j| ≤ t_j·scale(token).

    Attributes:
        of_x_alone: whether the scale depends on the hidden state only, so that projections that
            read the same one need it once.
        weighs_tokens: whether :meth:`fit` finds something, and calibration has to measure how
            important tokens are.
    """

    of_x_alone: bool = False
    weighs_tokens: bool = False

    def fit(self, x: Tensor, importance: Tensor) -> list[Tensor | None]:
        """What :meth:`scale` reads off a hidden state for each projection that reads it.

        Args:
            x: their inputs on calibration text [windows, T, K].
            importance: of these tokens to P projections, [P, windows, T] float32, see
                :class:`wina.importance.TokenImportance`.

        Returns:
            For each a probe [K + 1] float32, its constant last; None if nothing.
        """
        return [None] * len(importance)

    @abstractmethod
    def scale(
        self, x: Tensor, threshold: Tensor, sparsity: float, probe: Tensor | None = None
    ) -> Tensor | None:
        """The factor that multiplies a token's thresholds.

        Args:
            x: hidden states [..., K].
            threshold: t [K] float32 (during calibration: 1/c, a cut-off of 1).
            sparsity: share of channels to drop.
            probe: what :meth:`fit` found for the projection.

        Returns:
            [...] float32, or None where every token has the same cut-off.
        """

    def cutoff(self, histogram: ScoreHistogram, sparsity: float) -> float:
        """The cut-off from the calibration scores |x_j|·c_j/scale: their ``sparsity``-quantile."""
        return histogram.quantile(sparsity)


SELECTORS: Registry[type[Selector]] = Registry("selector")
