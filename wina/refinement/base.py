"""What a refinement is, and what it may look at. Knows nothing of models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from wina.needs import Needs
from wina.registry import Registry


@dataclass(frozen=True)
class Slopes:
    """What moving thresholds does, estimated on some tokens.

    Attributes:
        loss: KL(dense ‖ sparse), nats per token.
        read: share of the projections' weights that a token reads.
        of_loss: projection name → ∂loss/∂log t, [K] float32.
        of_read: projection name → ∂read/∂log t, [K] float32, ≤ 0.
    """

    loss: float
    read: float
    of_loss: Mapping[str, Tensor]
    of_read: Mapping[str, Tensor]


@dataclass(frozen=True)
class Exercise:
    """A sparse model whose thresholds may be moved.

    Attributes:
        windows: calibration tokens [windows, S].
        logs: projection name → log t [K] float32, to be changed in place. A channel that is always
            kept has −inf and one that is always dropped +inf; they have no slopes and stay.
        read: the budget: share of the projections' weights that a token shall read.
        slopes: token ids [B, S] → what moving ``logs`` does, as they are now.
        show_progress: draw a bar on stderr.
    """

    windows: Tensor
    logs: Mapping[str, Tensor]
    read: float
    slopes: Callable[[Tensor], Slopes]
    show_progress: bool = False


class Refinement(ABC):
    """Moves the thresholds of all projections of a model together.

    What it leaves is scaled by one number afterwards, so that the budget is met on the calibration
    text. At run time it costs nothing: a plan holds a threshold for each channel anyway. Parameters
    are keyword arguments of ``__init__``, as for allocation policies.

    Attributes:
        needs: what it has to compute.
        text: calibration tokens that it wants to read, where there are as many.
    """

    needs: Needs = Needs.NOTHING
    text: int = 0

    @abstractmethod
    def refine(self, exercise: Exercise) -> None:
        """Move the thresholds in place."""


NO_REFINEMENT = "none"
REFINEMENTS: Registry[type[Refinement]] = Registry("refinement")


@REFINEMENTS.register(NO_REFINEMENT)
class Unrefined(Refinement):
    """Thresholds stay as criterion, allocation and selector gave them."""

    def refine(self, exercise: Exercise) -> None:
        """Nothing."""
