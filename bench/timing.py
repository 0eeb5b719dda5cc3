"""Timing on shared, noisy machines: interleaved rounds, ratios by round, and a verdict on noise.

A time says little where other work comes and goes; a ratio of two times taken next to each other
says more. So contenders run in turn, in every round, and a claim is the median over the rounds of
the ratio inside a round. Whoever reads a ratio also gets an interval for it, and is told when the
interval is wide or the first and the second half of the rounds disagree: such a ratio would not
come out again.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wina.progress import progress

# A ratio is claimed where it would come out again within this share. Two runs are both uncertain:
# each may be so by the square root of a half of it.
NOISE_LIMIT = 0.05
CLAIM_LIMIT = NOISE_LIMIT / math.sqrt(2)
TOO_NOISY = "too noisy for the claim"
TOO_FEW = "too few rounds for a claim"
STEADY = "steady"
_FEWEST = 4


@dataclass(frozen=True)
class Effort:
    """How much work a bench spends.

    Attributes:
        rounds: interleaved rounds after one of warming up.
        passes: times that a grid is gone through, with a share of the rounds each, so that halves
            of the rounds lie far apart: a machine may be slow for seconds on end.
        most_passes: limit up to which points that are too noisy to be claimed are gone through.
        cold_bytes: size of the weights rotated through, which must not fit into any cache.
        call_bytes: weights read between two looks at the clock.
        claims: False where the times are to show that a bench runs, and nothing else.
    """

    rounds: int
    cold_bytes: int
    call_bytes: int
    claims: bool = True
    passes: int = 1
    most_passes: int = 1


FULL = Effort(rounds=16, passes=2, most_passes=6, cold_bytes=512 << 20, call_bytes=128 << 20)
QUICK = Effort(rounds=2, cold_bytes=1 << 20, call_bytes=1 << 18, claims=False)


@dataclass(frozen=True)
class Timing:
    """Seconds of one contender in every round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median over the rounds, in seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Interquartile range over the median: how noisy the machine was."""
        if len(self.seconds) < 4:
            return (max(self.seconds) - min(self.seconds)) / self.median
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / self.median


@dataclass(frozen=True)
class Comparison:
    """How many times faster one contender is than another, with what is needed to believe it.

    Attributes:
        ratio: median of the ratios round by round.
        low, high: an interval that holds the true median with at least 95 % where six rounds or
            more were run; the extremes where fewer.
        halves: the same median over the first and over the second half of the rounds.
        rounds: how many there were.
    """

    ratio: float
    low: float
    high: float
    halves: tuple[float, float]
    rounds: int

    @property
    def disagreement(self) -> float:
        """Relative difference of the halves."""
        first, second = self.halves
        return abs(first - second) / min(first, second)

    @property
    def half_width(self) -> float:
        """Half the width of the interval, relative to the ratio."""
        return (self.high - self.low) / 2 / self.ratio

    @property
    def uncertainty(self) -> float:
        """By how much, relatively, the ratio may differ when measured again."""
        return max(self.disagreement, self.half_width)

    @property
    def verdict(self) -> str:
        """Whether the ratio may be claimed."""
        if self.rounds < _FEWEST:
            return TOO_FEW
        return TOO_NOISY if self.uncertainty > CLAIM_LIMIT else STEADY


def compare(slow: Timing, fast: Timing) -> Comparison:
    """Compare two contenders of the same interleaved run."""
    ratios = [a / b for a, b in zip(slow.seconds, fast.seconds, strict=True)]
    middle = len(ratios) // 2
    first = ratios[:middle] or ratios
    return Comparison(
        ratio=statistics.median(ratios),
        low=(interval := median_interval(ratios))[0],
        high=interval[1],
        halves=(statistics.median(first), statistics.median(ratios[middle:])),
        rounds=len(ratios),
    )


def ratio(slow: Timing, fast: Timing) -> float:
    """How many times faster ``fast`` is: the median of the ratios round by round."""
    return compare(slow, fast).ratio


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Bounds of the median by order statistics, which assumes no distribution.

    The k-th smallest and k-th largest of n values enclose the median with probability
    1 − 2·P(Binomial(n, ½) < k); the largest such k is taken, and 1 where none suffices.
    """
    ordered = sorted(values)
    n = len(ordered)
    tail, k = 0.0, 0
    while k < n // 2:
        tail += math.comb(n, k) / 2**n
        if 2 * tail > 1.0 - confidence:
            break
        k += 1
    k = max(k, 1)
    return ordered[k - 1], ordered[n - k]


def interleave(
    contenders: Mapping[str, Callable[[], float | None]],
    rounds: int,
    title: str = "timing",
    show_progress: bool = True,
    warm: bool = False,
) -> dict[str, Timing]:
    """Run every contender once a round, in turn, after one round of warming up unless all are warm.

    A contender may return the seconds it measured itself; otherwise its call is timed. Running in
    turn makes a slow phase of the machine hit all alike, so ratios are steadier than times. Every
    second round goes backwards, so that nobody always follows the same neighbour.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders.items())
    first = 1 if warm else 0
    with progress(title, (rounds + 1 - first) * len(contenders), show_progress) as advance:
        for number in range(first, rounds + 1):
            for name, contender in order if number % 2 else reversed(order):
                start = time.perf_counter()
                measured = contender()
                elapsed = time.perf_counter() - start if measured is None else measured
                if number > 0:
                    seconds[name].append(elapsed)
                advance()
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def claim(comparison: Comparison, effort: Effort = FULL) -> dict[str, Any]:
    """What a row says beside its ratio: {low, high, uncertainty, rounds, verdict}."""
    return {
        "low": comparison.low,
        "high": comparison.high,
        "uncertainty": comparison.uncertainty,
        "rounds": comparison.rounds,
        "verdict": comparison.verdict if effort.claims else "quick: no claim",
    }


def noise_warnings(rows: Sequence[Mapping[str, Any]], what: Sequence[str]) -> list[str]:
    """One line for people if rows are too noisy; ``what`` names the fields that identify a row."""
    noisy = [row for row in rows if row.get("verdict") in (TOO_NOISY, TOO_FEW)]
    if not noisy:
        return []
    worst = max(noisy, key=lambda row: row["uncertainty"])
    label = " ".join(str(worst[field]) for field in what)
    return [
        f"{len(noisy)} of {len(rows)} ratios are not to be claimed: uncertain "
        f"by up to {worst['uncertainty']:.0%} (limit {CLAIM_LIMIT:.1%}; worst: {label}; fewest "
        f"rounds: {min(row['rounds'] for row in noisy)}). Leave the machine alone and repeat, or "
        "raise --rounds."
    ]
