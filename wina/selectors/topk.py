"""Exactly K·(1−s) channels of every token."""

from __future__ import annotations

import torch
from torch import Tensor

from wina.selectors.base import SELECTORS, Selector
from wina.statistics import ScoreHistogram


@SELECTORS.register("topk")
class TopK(Selector):
    """Keep the K − round(s·K) largest |x_j|·c_j, at least one (WINA, arXiv 2505.19427).

    The token's cut-off lies half way between the last score kept and the first one dropped, so
    that rounding in |x_j| ≤ cutoff/c_j cannot move a channel across it. Channels with equal
    scores are kept or dropped together.
    """

    def scale(self, x: Tensor, threshold: Tensor, sparsity: float) -> Tensor | None:
        """The cut-off of every token, in float32."""
        channels = x.shape[-1]
        dropped = min(round(sparsity * channels), channels - 1)
        if dropped <= 0:
            return x.new_full(x.shape[:-1], -1.0, dtype=torch.float32)
        scores = (x.abs().to(torch.float32) / threshold).nan_to_num(nan=torch.inf)
        # Of the smallest dropped + 1 scores, the two largest are either side of the cut.
        smallest = scores.topk(dropped + 1, dim=-1, largest=False).values
        return (smallest[..., dropped - 1] + smallest[..., -1]) / 2

    def cutoff(self, histogram: ScoreHistogram, sparsity: float) -> float:
        """1: the scale is the cut-off."""
        return 1.0
