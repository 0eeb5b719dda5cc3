"""Column norms and streaming quantiles: what calibration measures.

Knows nothing of models, methods or plans.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wina.errors import CalibrationError

# A norm is computed over this many weights at a time in float64, so that its peak memory does not
# depend on the layer.
_NORM_CHUNK = 1 << 22

# Hidden states widened to float32 at a time.
_ROWS = 2048

# float32 bit patterns without the sign, truncated to 8 exponent and 7 mantissa bits.
_SHIFT = 16
_BINS = 1 << 15


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
        self.counts = torch.zeros(_BINS, dtype=torch.int64)

    @property
    def total(self) -> int:
        """Number of scores seen."""
        return int(self.counts.sum())

    def add(self, scores: Tensor) -> None:
        """Count scores (any shape, float32, ≥ 0); NaN or Inf raises :class:`CalibrationError`."""
        if not scores.numel():
            return
        bits = _bins(scores)
        if bits.min() < 0:  # the sign bit
            raise CalibrationError("scores must not be negative")
        counts = torch.bincount(bits, minlength=_BINS).cpu()
        if counts[_bin(torch.inf) :].any():
            raise CalibrationError("found NaN or Inf among the scores")
        self.counts += counts

    def merge(self, other: ScoreHistogram) -> None:
        """Add the scores that another histogram has seen."""
        self.counts += other.counts

    def quantile(self, share: float) -> float:
        """The value with ``share`` of the scores at or below it, linear inside its bin.

        ``share`` = 0 gives −1, which no score is at or below: the cut-off that keeps everything.
        """
        if not 0.0 <= share <= 1.0:
            raise CalibrationError(f"a quantile lies between 0 and 1, not at {share}")
        if share == 0.0:
            return -1.0
        total = self.total
        if total == 0:
            raise CalibrationError("no scores were seen, so they have no quantile")
        cumulative = self.counts.cumsum(0)
        wanted = share * total
        index = int(torch.searchsorted(cumulative, torch.tensor(wanted, dtype=torch.float64)))
        index = min(index, _BINS - 1)
        low, high = _edge(index), _edge(index + 1)
        below = int(cumulative[index - 1]) if index else 0
        inside = int(self.counts[index])
        return low + (high - low) * ((wanted - below) / inside if inside else 0.0)


def exceeded(scores: Tensor, cuts: Tensor) -> Tensor:
    """How many cut-offs each score exceeds: what ``searchsorted`` says, many times faster.

    A table tells it by the score's bin; only the cut-offs inside that bin are compared.

    Args:
        scores: any shape, float32, ≥ 0.
        cuts: [n] float32, increasing; all scores exceed a negative one.

    Returns:
        int64 of the scores' shape.
    """
    bins = _bins(scores)
    positive = cuts[cuts >= 0.0].cpu()
    of_cuts = _bins(positive).long()
    below = torch.zeros(_BINS + 1, dtype=torch.int64)
    below[1:] = torch.bincount(of_cuts, minlength=_BINS).cumsum(0)
    found = (below[:-1] + (len(cuts) - len(positive))).to(scores.device).index_select(0, bins)
    # Cut-offs that share a bin are compared one after the other.
    rank = torch.arange(len(positive)) - below[of_cuts]
    for number in range(int(rank.max()) + 1 if len(rank) else 0):
        inside = torch.full((_BINS,), torch.inf)
        inside[of_cuts[rank == number]] = positive[rank == number]
        found += scores.flatten() > inside.to(scores.device).index_select(0, bins)
    return found.view(scores.shape)


def _bins(scores: Tensor) -> Tensor:
    """The bin of every score, flat; negative for a negative one."""
    return scores.contiguous().view(torch.int32).flatten() >> _SHIFT


def _bin(value: float) -> int:
    return int(_bins(torch.tensor(value, dtype=torch.float32)))


def _edge(index: int) -> float:
    return float(torch.tensor(index << _SHIFT, dtype=torch.int32).view(torch.float32))
