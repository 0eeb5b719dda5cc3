"""The problem that calibration poses to an allocation policy, caught on its way."""

from __future__ import annotations

import pytest
from conftest import CALIBRATION, config
from torch import nn

import wina
from wina.allocation import Allocation, Problem


class _Spy(Allocation):
    """A uniform policy that keeps the problem."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []

    def allocate(self, problem: Problem) -> dict[str, float]:
        self.problems.append(problem)
        return {unit.name: problem.sparsity for unit in problem.units}


def problem_of(model: nn.Module) -> Problem:
    """The problem for a tiny model: 4 windows of 64 tokens, WINA's scores, budget 0.5."""
    spy = _Spy()
    settings = config(calibration_tokens=256, window=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wina.config.SparsityConfig.make_allocation", lambda self: spy)
        wina.calibrate(model, None, settings, CALIBRATION, show_progress=False)
    return spy.problems[0]
