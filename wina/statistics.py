"""Column norms and streaming quantiles: what calibration measures.

Knows nothing of models, methods or plans.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wina.errors import CalibrationError
from wina.kernels.counting import BINS, SHIFT, bins_of

# A norm is computed over this many weights at a time in float64, so that its peak memory does not
# depend on the layer.
_NORM_CHUNK = 1 << 22

# Hidden states widened to float32 at a time.
_ROWS = 2048


def column_norms(weights: Sequence[Tensor], p: float = 2.0) -> Tensor:
    """‖W_:,j‖_p of the rows-stacked matrix of ``weights``.

    Args:
        weights: matrices [N_i, K] of one projection group (any float dtype, any strides).
        p: order of the norm, > 0.

    Returns:
        [K] float32, accumulated in float64. Every backend and integration takes its norms from
        here, so that all of them choose the same channels.
    """
    first = weights[0]
    total = torch.zeros(first.shape[1], dtype=torch.float64, device=first.device)
    for weight in weights:
        rows = max(1, _NORM_CHUNK // max(1, weight.shape[1]))
        for chunk in weight.detach().split(rows):
            total += chunk.to(torch.float64).abs().pow_(p).sum(0)
    return total.pow_(1.0 / p).to(torch.float32)


def second_moments(x: Tensor) -> Tensor:
    """Σ x·xᵀ over hidden states [..., K]: [K, K] float32."""
    K = x.shape[-1]
    total = torch.zeros((K, K), dtype=torch.float32, device=x.device)
    for rows in x.detach().reshape(-1, K).split(_ROWS):
        wide = rows.to(torch.float32)
        total.addmm_(wide.t(), wide)
    return total


class ScoreHistogram:
    """Quantiles of a stream of non-negative scores in constant memory (256 KiB).

    The bins are float32 bit patterns cut to bfloat16's precision: logarithmic, 128 to an octave,
    covering all of float32, so no range has to be known in advance.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.int64)
        self._cumulative: Tensor | None = None

    @property
    def total(self) -> int:
        """Number of scores seen."""
        return int(self.counts.sum())

    def add(self, scores: Tensor) -> None:
        """Count scores (any shape, float32, ≥ 0); NaN or Inf raises :class:`CalibrationError`."""
        if scores.numel() and scores.min() < 0:
            raise CalibrationError("scores must not be negative")
        self.add_counts(torch.bincount(bins_of(scores), minlength=BINS))

    def add_counts(self, counts: Tensor) -> None:
        """Add scores that are counted: [BINS] int64, see :func:`wina.kernels.counting.bins_of`."""
        counts = counts.cpu()
        if counts[_INFINITE:].any():
            raise CalibrationError("found NaN or Inf among the scores")
        self.counts += counts
        self._cumulative = None

    def merge(self, other: ScoreHistogram) -> None:
        """Add the scores that another histogram has seen."""
        self.add_counts(other.counts)

    def quantile(self, share: float) -> float:
        """The value with ``share`` of the scores at or below it, linear inside its bin.

        ``share`` = 0 gives −1, which no score is at or below: the cut-off that keeps everything.
        """
        if not 0.0 <= share <= 1.0:
            raise CalibrationError(f"a quantile lies between 0 and 1, not at {share}")
        if share == 0.0:
            return -1.0
        if self._cumulative is None:
            self._cumulative = self.counts.cumsum(0)
        cumulative = self._cumulative
        total = int(cumulative[-1])
        if total == 0:
            raise CalibrationError("no scores were seen, so they have no quantile")
        wanted = share * total
        index = int(torch.searchsorted(cumulative, torch.tensor(wanted, dtype=torch.float64)))
        index = min(index, BINS - 1)
        low, high = _edge(index), _edge(index + 1)
        below = int(cumulative[index - 1]) if index else 0
        inside = int(self.counts[index])
        return low + (high - low) * ((wanted - below) / inside if inside else 0.0)


def _edge(index: int) -> float:
    return float(torch.tensor(index << SHIFT, dtype=torch.int32).view(torch.float32))


# The first bin of no number.
_INFINITE = int(bins_of(torch.tensor(torch.inf)))
