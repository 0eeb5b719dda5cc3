"""What a refinement is, and what it may look at. Knows nothing of models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from wina.needs import Needs
from wina.registry import Registry


@dataclass(frozen=True)
class Slopes:
    """What moving thresholds and constants does, estimated on some tokens.

    Attributes:
        loss: KL(dense ‖ sparse), nats per token.
        read: share of the projections' weights that a token reads.
        of_loss: projection name → ∂loss/∂log t, [K] float32.
        of_read: projection name → ∂read/∂log t, [K] float32, ≤ 0.
        of_shift: projection name → ∂loss/∂shift, [N] float32.
    """

    loss: float
    read: float
    of_loss: Mapping[str, Tensor]
    of_read: Mapping[str, Tensor]
    of_shift: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Exercise:
    """A sparse model whose thresholds may be moved, and constants added to its products.

    Attributes:
        windows: calibration tokens [windows, S].
        logs: projection name → log t [K] float32, to be changed in place. A channel that is always
            kept has −inf and one that is always dropped +inf; they have no slopes and stay.
        read: the budget: share of the projections' weights that a token shall read.
        slopes: token ids [B, S] → what moving ``logs`` and ``shifts`` does, as they are now.
        shifts: projection name → what is added to its sparse products, [N] float32, in standard
            deviations of each output of the dense model. Zero at first, to be changed in place.
        show_progress: draw a bar on stderr.
    """

    windows: Tensor
    logs: Mapping[str, Tensor]
    read: float
    slopes: Callable[[Tensor], Slopes]
    shifts: Mapping[str, Tensor] = field(default_factory=dict)
    show_progress: bool = False


class Refinement(ABC):
    """Moves the thresholds of all projections of a model together, and constants with them.

    Thresholds are scaled by one number afterwards, so that the budget is met on the calibration
    text. At run time they cost nothing: a plan holds one for each channel anyway. Constants are
    read, and ride in the bias that kernels add. Parameters are keyword arguments of ``__init__``,
    as for allocation policies.

    Attributes:
        needs: what it has to compute.
        text: calibration tokens that it wants to read, where there are as many.
        moves_constants: it reads slopes of constants; without, they stay at zero.
    """

    needs: Needs = Needs.NOTHING
    text: int = 0
    moves_constants: bool = False

    @abstractmethod
    def refine(self, exercise: Exercise) -> None:
        """Move thresholds, and constants where there are any, in place."""


NO_REFINEMENT = "none"
REFINEMENTS: Registry[type[Refinement]] = Registry("refinement")


@REFINEMENTS.register(NO_REFINEMENT)
class Unrefined(Refinement):
    """Thresholds stay as criterion, allocation and selector gave them."""

    def refine(self, exercise: Exercise) -> None:
        """Nothing."""
