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
from wina.kernels.quantization import quantize
from wina.planes import constants_of_planes, summed
from wina.selectors import Selector
from wina.statistics import ScoreHistogram, exceeded

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
        for rows in x.reshape(-1, x.shape[-1]).split(_ROWS):
            scores = rows.abs().to(torch.float32) * self.constants
            scale = self.selector.scale(rows, 1.0 / self.constants, sparsity, probe)
            if scale is not None:
                scores = scores / scale.clamp_min(1e-30).unsqueeze(-1)
            histogram.add(scores)

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

    def levels(self, x: Tensor, grid: Sequence[float]) -> Tensor:
        """At how many sparsities of a grid each channel is kept, cut-offs taken from x itself.

        Masks are nested: channel (t, j) is kept at ``grid[i]`` iff its level exceeds i.

        Args:
            x: hidden states [T, K].
            grid: sparsities in increasing order.

        Returns:
            [T, K] int64.
        """
        histogram = ScoreHistogram()
        self.count(histogram, x, grid[-1])
        cutoffs = [self.cutoff(histogram, sparsity) for sparsity in grid]
        one = self.threshold(1.0)
        scales = [self.selector.scale(x, one, sparsity) for sparsity in grid]
        scores = x.abs().to(torch.float32) * self.constants
        if all(scale is None for scale in scales):
            return exceeded(scores, torch.tensor(cutoffs))
        cuts = torch.empty(len(x), len(grid), device=x.device)
        for index, (cutoff, scale) in enumerate(zip(cutoffs, scales, strict=True)):
            cuts[:, index] = cutoff if scale is None else cutoff * scale
        return torch.searchsorted(cuts, scores)
