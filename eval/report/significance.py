"""Paired tests of two runs over the same documents, and Holm's correction."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.05
"""A difference counts if its corrected p is below this."""


@dataclass(frozen=True)
class _Link:
    """How a metric may come from its documents' mean m.

    ``tolerance`` is how far, relatively, the metric may lie from what the plain mean gives: a
    perplexity weights windows and documents by their tokens, the mean here counts them alike.
    """

    value: Callable[[float], float]
    slope: Callable[[float], float]
    tolerance: float


_LINKS = (
    _Link(lambda m: m, lambda m: 1.0, 0.02),
    _Link(lambda m: _exp(m), lambda m: _exp(m), 0.2),  # perplexity of mean nats
    _Link(lambda m: _exp(-m), lambda m: -_exp(-m), 0.2),  # perplexity of mean log-likelihoods
)


@dataclass(frozen=True)
class Paired:
    """A paired comparison.

    Attributes:
        test: its name.
        p: two-sided, uncorrected.
        documents: pairs.
        stderr: standard error of the difference of the two *metrics*, with documents paired.
    """

    test: str
    p: float
    documents: int
    stderr: float


def compare(
    rows: Sequence[float], others: Sequence[float], metric: float, other: float
) -> Paired | None:
    """Test whether two runs differ on the same documents.

    Right-or-wrong values: McNemar's exact test. Others: the paired t test.

    Args:
        rows: per-document values of one run, in document order.
        others: of the other run.
        metric: what the first run's rows amount to: their mean m, exp(m) or exp(−m).
        other: the same of the other run.

    Returns:
        None where no paired test is honest: fewer than two pairs, different numbers of documents,
        values that are not finite, or rows that do not average to the metric.
    """
    a, b = np.asarray(rows, np.float64), np.asarray(others, np.float64)
    if len(a) != len(b) or len(a) < 2 or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return None
    weighted = _weighted(a, metric), _weighted(b, other)
    if weighted[0] is None or weighted[1] is None:
        return None
    stderr = float(np.std(weighted[0] - weighted[1], ddof=1) / math.sqrt(len(a)))
    if {*np.unique(a), *np.unique(b)} <= {0.0, 1.0}:
        return Paired("McNemar exact", mcnemar(a, b), len(a), stderr)
    return Paired("paired t", paired_t(a, b), len(a), stderr)


def mcnemar(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> float:
    """Exact two-sided p of McNemar's test on values that are 0 or 1 (McNemar 1947).

    Only documents that one run got right and the other wrong count; under the null hypothesis each
    is a fair coin.
    """
    a, b = np.asarray(a), np.asarray(b)
    gained, lost = int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum())
    return float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def paired_t(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> float:
    """Two-sided p of Student's t test on the differences of pairs; 1 if all pairs are equal."""
    differences = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    spread = np.std(differences, ddof=1)
    mean = abs(differences.mean())
    if spread <= 1e-12 * mean or spread == 0.0:  # a constant shift leaves nothing to chance
        return 0.0 if mean else 1.0
    t = mean / (spread / math.sqrt(len(differences)))
    return float(2 * stats.t.sf(t, len(differences) - 1))


def z_test(difference: float, stderr: float) -> float:
    """Two-sided p of a difference with a known standard error, by the normal distribution."""
    if stderr == 0.0:
        return 0.0 if difference else 1.0
    return float(2 * stats.norm.sf(abs(difference) / stderr))


def holm(values: Sequence[float | None]) -> list[float | None]:
    """Holm's (1979) step-down correction: p that keep the chance of any false find at the level.

    None (not tested) stays None and does not count.
    """
    tested = sorted((p, i) for i, p in enumerate(values) if p is not None)
    corrected: list[float | None] = [None] * len(values)
    largest = 0.0
    for rank, (p, index) in enumerate(tested):
        largest = max(largest, min(1.0, p * (len(tested) - rank)))
        corrected[index] = largest
    return corrected


def _weighted(rows: np.ndarray, metric: float) -> np.ndarray | None:
    """Rows times the metric's derivative, so that their differences are in the metric's unit."""
    mean = float(rows.mean())
    for link in _LINKS:
        if math.isclose(link.value(mean), metric, rel_tol=link.tolerance, abs_tol=1e-9):
            return rows * link.slope(mean)
    return None


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))  # beyond it float64 overflows
