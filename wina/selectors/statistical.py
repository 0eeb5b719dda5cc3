"""A cut-off from the mean and spread of each token's own scores."""

from __future__ import annotations

from statistics import NormalDist

import torch
from torch import Tensor

from wina.selectors.base import SELECTORS, Selector
from wina.statistics import ScoreHistogram


@SELECTORS.register("statistical")
class Statistical(Selector):
    """Keep |x_j|·c_j > mean + std·Φ⁻¹(s), the statistical top-k of Spark Transformer and Gemma 3n.

    Mean and standard deviation are those of the token's scores: O(K), no sort, no calibration. The
    share dropped is s as far as scores are normally distributed; magnitudes are not, so it is off
    by what ``wina eval ppl`` shows as realised.
    """

    def scale(
        self, x: Tensor, threshold: Tensor, sparsity: float, probe: Tensor | None = None
    ) -> Tensor | None:
        """The cut-off of every token, in float32; below zero it keeps everything."""
        if sparsity <= 0.0:
            return x.new_full(x.shape[:-1], -1.0, dtype=torch.float32)
        scores = x.abs().to(torch.float32) / threshold
        spread, mean = torch.std_mean(scores, dim=-1, correction=0)
        return (mean + spread * NormalDist().inv_cdf(sparsity)).clamp_min(-1.0)

    def cutoff(self, histogram: ScoreHistogram, sparsity: float) -> float:
        """1: the scale is the cut-off."""
        return 1.0
