"""Exactly K·(1−s) channels of every token."""

from __future__ import annotations

import torch
from torch import Tensor

from wina.kernels import ops
from wina.selectors.base import SELECTORS, Selector
from wina.statistics import ScoreHistogram


@SELECTORS.register("topk")
class TopK(Selector):
    """Keep the K − round(s·K) largest |x_j|·c_j, at least one (WINA, arXiv 2505.19427).

    Channels with equal scores are kept or dropped together.
    """

    def scale(
        self, x: Tensor, threshold: Tensor, sparsity: float, probe: Tensor | None = None
    ) -> Tensor | None:
        """The cut-off of every token, in float32."""
        channels = x.shape[-1]
        dropped = min(round(sparsity * channels), channels - 1)
        if dropped <= 0:
            return x.new_full(x.shape[:-1], -1.0, dtype=torch.float32)
        return ops.topk_scale(x, threshold, dropped)

    def cutoff(self, histogram: ScoreHistogram, sparsity: float) -> float:
        """1: the scale is the cut-off."""
        return 1.0
