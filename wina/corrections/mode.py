"""Channels that are dropped count as the value that inputs have most often."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from wina.corrections.base import CORRECTIONS, Correction, Fit, Products, Terms
from wina.registry import share, whole

# Inputs that are looked at: a sample of tokens, some numbers for each bin.
_SAMPLE = 1 << 20


@CORRECTIONS.register("mode")
class Mode(Correction):
    """y = W(m⊙(x − μ)) + W·μ, m_j = [|x_j − μ| > τ/c_j], μ the mode of the projection's inputs.

    SCAP's shift (arXiv 2412.07174), which makes inputs sparser whose values gather around another
    number than zero. μ is one number for all channels, taken from the first calibration tokens: the
    middle of the fullest bin, once counts are smoothed.

    Args:
        bins: of the histogram.
        smooth: share of the bins over which a count is spread, as a triangle.
        most: share of inputs, the middle ones, that the bins span.
    """

    def __init__(self, bins: float = 512, smooth: float = 0.05, most: float = 0.98) -> None:
        self.bins = whole("bins", bins)
        self.smooth = share("smooth", smooth)
        self.most = share("most", most)

    def fit(self) -> Fit:
        """Begin without a mode."""
        return _Centered(self)

    def mode(self, x: Tensor) -> float:
        """The mode of the numbers of x [T, K]."""
        rows = max(1, _SAMPLE // x.shape[1])
        values = x[:: max(1, -(-len(x) // rows))].float().flatten()
        tail = (1.0 - self.most) / 2
        low, high = values.quantile(torch.tensor([tail, 1.0 - tail], device=x.device)).tolist()
        if not low < high:
            return float(low)
        counts = torch.histc(values, self.bins, low, high)[None]
        half = int(self.smooth * self.bins) // 2
        for _ in range(2):
            counts = F.avg_pool1d(counts, 2 * half + 1, 1, half)
        return float(low + (int(counts.argmax()) + 0.5) * (high - low) / self.bins)


class _Centered(Fit):
    def __init__(self, correction: Mode) -> None:
        self.correction = correction
        self.found: Tensor | None = None

    def center(self, x: Tensor) -> Tensor:
        self.found = torch.full((x.shape[1],), self.correction.mode(x), device=x.device)
        return self.found

    def add(self, products: Products) -> None:
        pass

    def terms(self, weight: Tensor) -> Terms:
        assert self.found is not None
        return Terms(bias=weight.detach().float() @ self.found, center=self.found)
