"""Timing on shared, noisy machines: interleaved rounds, medians, and a word about the noise."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from wina.progress import progress


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


def ratio(slow: Timing, fast: Timing) -> float:
    """How many times faster ``fast`` is: the median of the ratios round by round."""
    return statistics.median(a / b for a, b in zip(slow.seconds, fast.seconds, strict=True))


def interleave(
    contenders: Mapping[str, Callable[[], float | None]],
    rounds: int,
    title: str = "timing",
    show_progress: bool = True,
) -> dict[str, Timing]:
    """Run every contender once a round, in turn, after one round of warming up.

    A contender may return the seconds it measured itself; otherwise its call is timed. Running in
    turn makes a slow phase of the machine hit all alike, so ratios are steadier than times.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    with progress(title, (rounds + 1) * len(contenders), show_progress) as advance:
        for number in range(rounds + 1):
            for name, contender in contenders.items():
                start = time.perf_counter()
                measured = contender()
                elapsed = time.perf_counter() - start if measured is None else measured
                if number > 0:
                    seconds[name].append(elapsed)
                advance()
    return {name: Timing(tuple(values)) for name, values in seconds.items()}
