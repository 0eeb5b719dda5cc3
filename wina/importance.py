"""How important each calibration token is to each projection, from one backward pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from wina.allocation.gradients import Watch, differentiate
from wina.projections import Projection, linear_of


class _Energy(Watch):
    """Keeps |Wᵀg|² of every token."""

    def __init__(self, module: nn.Linear) -> None:
        super().__init__(module)
        self.windows: list[Tensor] = []

    def see(self, gradient: Tensor) -> None:
        """Add those of a window."""
        self.windows.append(gradient.flatten(0, -2).float().square().sum(-1).cpu())


class TokenImportance:
    """|Wᵀg|² of every token, g = ∂loss/∂output of a projection.

    A small error δx of the projection's input changes the loss by gᵀWδx. The loss is a random
    direction of the logits, see :func:`wina.allocation.gradients.loss_changes`: what a token's
    error does to its own prediction and to those of all later tokens of the window.

    Args:
        model: dense; it is run and left as it was.
        units: projections that share a mask, and so the sum of their tokens' importance.
        windows: token ids [windows, S].
    """

    def __init__(
        self, model: nn.Module, units: Sequence[Sequence[Projection]], windows: Tensor
    ) -> None:
        self._model = model
        self._units = units
        self._windows = windows
        self._energies = {p.name: _Energy(linear_of(model, p.name)) for unit in units for p in unit}

    @property
    def watched(self) -> list[Watch]:
        """What sees gradients: for a pass over the dense model and all windows that others make."""
        return list(self._energies.values())

    def measured(self, show_progress: bool = False) -> dict[str, Tensor]:
        """Projection → [windows, S] float32 on the CPU; none for one that does not see all tokens.

        Makes the pass unless another did.

        Args:
            show_progress: draw a progress bar on stderr.
        """
        if not any(energy.windows for energy in self._energies.values()):
            differentiate(self._model, self.watched, self._windows, show_progress)
        shape = self._windows.shape
        found = {}
        for unit in self._units:
            members = [self._energies[projection.name].windows for projection in unit]
            if any(sum(map(len, member)) != shape.numel() for member in members):
                continue
            total = sum((torch.cat(member) for member in members), start=torch.zeros(shape.numel()))
            found.update({projection.name: total.view(shape) for projection in unit})
        return found
