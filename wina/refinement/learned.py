"""Thresholds and constants learned through the whole sparse model."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from wina.needs import Needs
from wina.progress import progress
from wina.refinement.base import REFINEMENTS, Exercise, Refinement
from wina.registry import share, whole

_FIRST, _SECOND = 0.9, 0.98  # decay of Adam's moments
_WARM_UP = 5  # steps in which the rate rises
_GAIN = 0.3  # of a batch's distance from the budget, the part that is made up for at once


@REFINEMENTS.register("learned")
class Learned(Refinement):
    """t and b that lower KL(dense ‖ sparse) at the same bytes, weights frozen.

    Every channel's log t_j is moved by itself: bytes go to other channels of a projection (the
    factor c_j of its score), and to other projections. The loss that is descended is KL + λ·read. λ
    is the price at which scaling all thresholds at once gains nothing, taken from the slopes of the
    last batches, so no step is wasted on reading more; what each batch reads above the budget is
    taken back by such a scaling. Adam, with one second moment for all channels of a projection: the
    channels that matter little move little, whatever their noise.

    b is a constant for each output: the idea of SPON (arXiv 2512.12744), whose constant input of a
    projection is a constant of its output. Adam with a moment for each.

    Args:
        steps: of Adam.
        channels: rate of log t, at first; it falls to zero. 0 for none, as for the next one.
        constants: the same of b, in standard deviations of each output.
        batch: calibration tokens in one step.
        text: calibration tokens to read, where there are as many.
    """

    needs = Needs.EVALUATIONS

    def __init__(
        self,
        steps: float = 96,
        channels: float = 0.02,
        constants: float = 0.005,
        batch: float = 1024,
        text: float = 98304,
    ) -> None:
        self.steps = whole("steps", steps)
        self.channels = share("channels", channels, zero=True)
        self.constants = share("constants", constants, zero=True)
        self.moves_constants = self.constants > 0.0
        self.batch = whole("batch", batch)
        self.text = whole("text", text)

    def refine(self, exercise: Exercise) -> None:
        """Take the steps, each on other windows until all were read."""
        batches = self._batches(exercise.windows)
        channel = {name: _Adam() for name in exercise.logs}
        constant = {name: _Adam(each=True) for name in exercise.shifts}
        loss_slope, read_slope = _Mean(), _Mean()
        with progress("learning", self.steps, exercise.show_progress) as advance:
            for step in range(self.steps):
                rate = min(1.0, (step + 1) / _WARM_UP) * (1.0 - step / self.steps)
                slopes = exercise.slopes(batches[step % len(batches)])
                # What moving all logs by 1 does.
                lost = loss_slope.add(_total(slopes.of_loss.values()))
                saved = max(-read_slope.add(_total(slopes.of_read.values())), 1e-6)
                price = max(0.0, lost / saved)
                back = _GAIN * (exercise.read - slopes.read) / saved
                for name, logs in exercise.logs.items():
                    slope = slopes.of_loss[name] + price * slopes.of_read[name]
                    logs -= rate * self.channels * channel[name].direction(slope) + back
                for name, shift in exercise.shifts.items() if self.constants else ():
                    slope = slopes.of_shift[name]
                    shift -= rate * self.constants * constant[name].direction(slope)
                advance()

    def _batches(self, windows: Tensor) -> list[Tensor]:
        """Windows of at most ``batch`` tokens in all, in an order that mixes the documents."""
        length = min(self.batch, windows.shape[1])
        pieces = windows[:, : windows.shape[1] // length * length].reshape(-1, length)
        order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0))
        return list(pieces[order].split(max(1, self.batch // length)))


class _Adam:
    """The direction of Adam.

    Args:
        each: keep a second moment for each number, not one for the whole tensor.
    """

    def __init__(self, each: bool = False) -> None:
        self.each = each
        self.first: Tensor | float = 0.0
        self.second: Tensor | float = 0.0
        self.steps = 0

    def direction(self, gradient: Tensor) -> Tensor:
        """Take a gradient in; what a rate of 1 would subtract."""
        self.steps += 1
        self.first = _FIRST * self.first + (1 - _FIRST) * gradient
        square = gradient.square() if self.each else gradient.square().mean()
        self.second = _SECOND * self.second + (1 - _SECOND) * square
        mean = self.first / (1 - _FIRST**self.steps)
        spread = torch.as_tensor(self.second / (1 - _SECOND**self.steps)).sqrt()
        return mean / spread.clamp_min(1e-12)


class _Mean:
    """A running mean of numbers, the last ones counting most."""

    def __init__(self) -> None:
        self.value: float | None = None

    def add(self, number: float) -> float:
        """Take one more in; the mean."""
        self.value = number if self.value is None else _FIRST * self.value + (1 - _FIRST) * number
        return self.value


def _total(slopes: Iterable[Tensor]) -> float:
    return sum(float(slope.sum()) for slope in slopes)
