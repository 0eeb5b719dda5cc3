"""What an allocation policy is, and what it may look at."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from wina.allocation.curves import Curve
from wina.allocation.measurements import Measurements
from wina.needs import Needs
from wina.projections import Projection
from wina.registry import Registry
from wina.scores import ChannelScores

if TYPE_CHECKING:
    from wina.allocation.gradients import Watch


@dataclass(frozen=True)
class Unit:
    """Projections that get one sparsity: one projection, or a group that shares its mask."""

    name: str
    projections: tuple[Projection, ...]

    @property
    def weights(self) -> int:
        """Number of weights: what one token reads when dense."""
        return sum(projection.weights for projection in self.projections)


@dataclass(frozen=True)
class Problem:
    """A budget to spend, and the model and text to learn from.

    Attributes:
        units: what gets a sparsity each, in the order in which a token passes them.
        sparsity: the budget: share of the units' weights that a token shall not read.
        model: the dense decoder with its head. A policy runs it and leaves it as it was.
        windows: calibration tokens [windows, S].
        scores: projection name → criterion and selector of its mask.
        sink_tokens: first tokens of a sequence, which stay dense.
        thresholds: (sparsity of each unit) → threshold [K] of each projection, calibrated on
            ``windows`` with every projection before it sparse.
        measurements: what policies have measured on this model with this text.
        about: what a measurement depends on beside the policy, JSON-ready.
        watched: who else wants to see the gradients of the dense model on all ``windows``, should
            a policy compute them.
        show_progress: draw progress bars on stderr.
    """

    units: Sequence[Unit]
    sparsity: float
    model: nn.Module
    windows: Tensor
    scores: Mapping[str, ChannelScores]
    sink_tokens: int
    thresholds: Callable[[Mapping[str, float]], Mapping[str, Tensor]]
    measurements: Measurements | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    watched: Sequence[Watch] = ()
    show_progress: bool = False

    @property
    def reach(self) -> float:
        """The highest sparsity that measurements have to cover."""
        return max(self.sparsity, self.measurements.reach if self.measurements else 0.0)

    def measured(self, measure: Callable[[], Any], **about: Any) -> Any:
        """What ``measure`` gives (JSON-ready), from the measurements if it is known there."""
        if self.measurements is None:
            return measure()
        return self.measurements.get({**self.about, **about}, measure)

    def measured_tensors(
        self, measure: Callable[[], Mapping[str, Tensor]], **about: Any
    ) -> Mapping[str, Tensor]:
        """Likewise for named tensors on the CPU, kept in memory."""
        if self.measurements is None:
            return measure()
        return self.measurements.tensors({**self.about, **about}, measure, remember=True)

    def curves(self, measure: Callable[[], Sequence[Curve]], **about: Any) -> list[Curve]:
        """Likewise for sensitivity curves."""
        measured = self.measured(
            lambda: [[curve.name, curve.weights, list(curve.points)] for curve in measure()],
            **about,
        )
        return [
            Curve(name, weights, [(sparsity, loss) for sparsity, loss in points])
            for name, weights, points in measured
        ]

    def by_projection(self, sparsities: Mapping[str, float]) -> dict[str, float]:
        """Sparsity of each projection, from that of each unit."""
        return {p.name: sparsities[unit.name] for unit in self.units for p in unit.projections}

    def tokens(self, limit: int) -> Tensor:
        """At most ``limit`` calibration tokens [windows, S], evenly from all the windows.

        Less than a window is the beginning of the first one.
        """
        if limit < self.windows.shape[1]:
            return self.windows[:1, : max(limit, self.sink_tokens + 2)]
        count = min(len(self.windows), limit // self.windows.shape[1])
        return self.windows[torch.linspace(0, len(self.windows) - 1, count).round().long()]


class Allocation(ABC):
    """Spends a budget of weight bytes over the projections of a model.

    The parameters of a policy are keyword arguments of its ``__init__``; a spec such as
    ``"fisher:rounds=2"`` hands them over as floats.

    Attributes:
        needs: what it has to run.
        by_block: whether it looks at one decoder block at a time, so that it cannot see the head.
    """

    needs: Needs = Needs.NOTHING
    by_block = False

    @abstractmethod
    def allocate(self, problem: Problem) -> Mapping[str, float]:
        """Sparsity of each unit, by name.

        The mean over units, weighted by their numbers of weights, equals ``problem.sparsity``:
        the share of projection weights that a decoded token does not read.
        """


ALLOCATIONS: Registry[type[Allocation]] = Registry("allocation")
