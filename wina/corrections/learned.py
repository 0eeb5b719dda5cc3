"""A constant for each output, learned through the whole sparse model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from wina.corrections.base import CORRECTIONS, Correction, Fit, Lesson
from wina.needs import Needs
from wina.progress import progress
from wina.registry import share, whole


@CORRECTIONS.register("learned")
class Learned(Correction):
    """b that lowers KL(dense ‖ sparse) on calibration text, weights and masks frozen.

    The idea of SPON (arXiv 2512.12744), whose constant input of a projection is a constant of its
    output. Adam, with a rate that falls to zero.

    Args:
        steps: of Adam.
        rate: of the first steps, in standard deviations of each output.
        tokens: calibration tokens in one step.
    """

    needs = Needs.EVALUATIONS
    learns = True

    def __init__(self, steps: float = 32, rate: float = 0.005, tokens: float = 512) -> None:
        self.steps = whole("steps", steps)
        self.rate = share("rate", rate)
        self.tokens = whole("tokens", tokens)

    def fit(self) -> Fit | None:
        """Nothing: it begins with zero."""
        return None

    def learn(self, lesson: Lesson) -> None:
        """Take the steps, each on other windows until all were read."""
        names = list(lesson.shifts)
        moves = [torch.zeros_like(lesson.shifts[name], requires_grad=True) for name in names]
        start = [lesson.shifts[name].detach().clone() for name in names]
        adam = torch.optim.Adam(moves, lr=self.rate, betas=(0.9, 0.98))
        decay = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - step / self.steps)
        batches = self._batches(lesson.windows)
        with progress("learning constants", self.steps, lesson.show_progress) as advance:
            for step in range(self.steps):
                ids = batches[step % len(batches)]
                dense = lesson.dense(ids)
                loss = F.kl_div(lesson.sparse(ids), dense, reduction="batchmean", log_target=True)
                gradients = torch.autograd.grad(loss, [lesson.shifts[name] for name in names])
                for name, move, gradient in zip(names, moves, gradients, strict=True):
                    move.grad = gradient * lesson.units[name]
                adam.step()
                decay.step()
                with torch.no_grad():
                    for name, move, origin in zip(names, moves, start, strict=True):
                        lesson.shifts[name].copy_(origin + move * lesson.units[name])
                advance()

    def _batches(self, windows: Tensor) -> list[Tensor]:
        """Windows of at most ``tokens`` tokens in all, in an order that mixes the documents."""
        length = min(self.tokens, windows.shape[1])
        pieces = windows[:, : windows.shape[1] // length * length].reshape(-1, length)
        order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0))
        return list(pieces[order].split(max(1, self.tokens // length)))
