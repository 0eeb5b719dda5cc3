"""Scores |x_j|·c_j of the input channels of one projection, and the masks they give.

What a criterion and a selector say together, for calibration and for allocation policies alike.
Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Generator, Tensor

from wina.criteria import Criterion
from wina.kernels import ops
from wina.kernels.counting import count_operator, sums_operator
from wina.kernels.quantization import quantize
from wina.planes import constants_of_planes, summed
from wina.selectors import Selector
from wina.statistics import ScoreHistogram

# Rows of an input whose scores are computed at a time.
_ROWS = 1024


def rounded(weight: Tensor, weight_dtype: str | None) -> Tensor:
    """A weight [N, K] as it will be in use, in its own dtype."""
    if weight_dtype is None:
        return weight
    return quantize(weight.t(), weight_dtype).dequantize().t().to(weight.dtype)


class ChannelScores:
    """Criterion and selector of one projection.

    Args:
        weights: the matrices [N_i, K] that the mask serves, see :class:`wina.criteria.Criterion`.
        criterion: gives c.
        selector: gives the cut-off and the factor of each token.
        seed: of the criterion's randomness.
        weight_dtype: what the weights will be rounded to; the criterion sees them rounded to the
            nearest, whatever the rounding: others need masks, which need the criterion.
        planes: of the weights, which are [N_i, planes·K] then, see :mod:`wina.planes`.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        criterion: Criterion,
        selector: Selector,
        seed: int,
        weight_dtype: str | None = None,
        planes: int = 1,
    ) -> None:
        self.weights = weights
        self.weight_dtype = weight_dtype
        self.criterion = criterion
        self.selector = selector
        self.seed = seed
        self.planes = planes

    @cached_property
    def constants(self) -> Tensor:
        """c [K] float32; [planes·K] for weights in planes."""
        generator = Generator().manual_seed(self.seed)
        weights = [rounded(weight, self.weight_dtype) for weight in self.weights]
        if self.planes == 1:
            return self.criterion.constants(weights, generator)
        whole = [summed(weight, self.planes) for weight in weights]
        found = self.criterion.constants(whole, generator)
        return constants_of_planes(weights, found, self.planes)

    def count(
        self, histogram: ScoreHistogram, x: Tensor, sparsity: float, probe: Tensor | None = None
    ) -> None:
        """Add the scores of hidden states x [..., K], in units of each token's factor."""
        for rows in x.detach().reshape(-1, x.shape[-1]).split(_ROWS):
            scale = self.selector.scale(rows, 1.0 / self.constants, sparsity, probe)
            histogram.add_counts(count_operator(rows, self.constants, scale))

    def threshold(self, cutoff: float) -> Tensor:
        """τ/c [K] float32; a cut-off of −1 keeps every channel, whatever its c.

        A channel without weights (c = 0) scores 0 and is dropped, also where τ is 0.
        """
        if cutoff == -1.0:
            return torch.full_like(self.constants, -1.0)
        return torch.where(self.constants == 0.0, torch.inf, cutoff / self.constants)

    def cutoff(self, histogram: ScoreHistogram, sparsity: float) -> float:
        """τ for a share of channels, from the scores counted so far."""
        return self.selector.cutoff(histogram, sparsity)

    def keep(
        self, x: Tensor, threshold: Tensor, sparsity: float, probe: Tensor | None = None
    ) -> Tensor:
        """Which channels of x [..., K] are active, Boolean [..., K]."""
        scale = self.selector.scale(x, threshold, sparsity, probe)
        return ops.keep_mask(x.detach(), threshold, scale)

    def kept_sums(self, x: Tensor, gradient: Tensor, grid: Sequence[float]) -> Tensor:
        """Σ_j x_j·g_j over the channels kept at each sparsity of a grid.

        One cut-off for all tokens, taken from x itself, whatever the selector.

        Args:
            x: hidden states [T, K].
            gradient: g, of the shape and dtype of x.
            grid: sparsities.

        Returns:
            [T, grid] float32.
        """
        histogram = ScoreHistogram()
        histogram.add_counts(count_operator(x, self.constants))
        cutoffs = torch.tensor([histogram.quantile(sparsity) for sparsity in grid])
        return sums_operator(x, gradient, self.constants, cutoffs.to(x.device))
