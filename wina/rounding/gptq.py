"""GPTQ: what rounding one channel does wrong is made up for by the channels after it."""

from __future__ import annotations

import torch
from torch import Tensor

from wina.errors import CalibrationError
from wina.kernels.quantization import (
    IntegerFormat,
    QuantizedWeight,
    choose_scales,
    finite_rows,
    from_groups,
    grouped,
    integers,
)
from wina.registry import share, whole
from wina.rounding.base import ROUNDINGS, Rounding

# Channels whose scales are chosen together, just before they are rounded, and whose errors reach
# the channels behind them in one product.
_BLOCK = 32


@ROUNDINGS.register("gptq")
class GPTQ(Rounding):
    """Least Σ‖(W − Ŵ)x‖² over the calibration tokens, greedily, channel by channel.

    Frantar et al., arXiv 2210.17323, algorithm 1, channels in descending order of E[x_j²]. With
    H = Σ xxᵀ + λI and UᵀU = H⁻¹ (U upper triangular), channel j is rounded, and its error divided
    by U_jj is taken, times U_ji, from every channel i that is still to come. A channel is a row of
    the layout and has scales of its own, so they are chosen when its turn comes. x are the inputs
    as the masks leave them: the channels that are often dropped weigh less.

    Args:
        damp: λ as a share of the mean of H's diagonal.
        channels: channels that make up for each other; a wider projection is cut into as many
            parts as needed, since time and memory grow with the square.
    """

    looks = True

    def __init__(self, damp: float = 0.05, channels: float = 4096) -> None:
        self.damp = share("damp", damp)
        self.channels = whole("channels", channels)

    def round_plane(
        self, weight: Tensor, moments: Tensor | None, form: IntegerFormat
    ) -> QuantizedWeight:
        """See :meth:`Rounding.round_plane`; a channel without inputs is rounded to the nearest."""
        assert moments is not None
        rows = finite_rows(weight.t(), form)
        if not moments.isfinite().all():
            raise CalibrationError("an input of calibration is NaN, Inf, or too large to square")
        parts = -(-len(rows) // self.channels)
        found = [
            self._round(part, moments[at][:, at], form)
            for part, at in zip(
                rows.tensor_split(parts),
                torch.arange(len(rows), device=rows.device).tensor_split(parts),
                strict=True,
            )
        ]
        scales, q = (torch.cat(tensors) for tensors in zip(*found, strict=True))
        return from_groups(scales, q, weight.shape[0], form)

    def _round(self, rows: Tensor, moments: Tensor, form: IntegerFormat) -> tuple[Tensor, Tensor]:
        """Scales [k, groups] and integers [k, groups, GROUP] of rows [k, N]."""
        order = moments.diagonal().argsort(descending=True, stable=True)
        rest = grouped(rows[order])
        follow = self._factor(moments[order][:, order])
        scales = torch.empty(rest.shape[:2], dtype=torch.float32, device=rows.device)
        q = torch.empty_like(rest, dtype=torch.int8)
        for first in range(0, len(rest), _BLOCK):
            block = rest[first : first + _BLOCK]
            last = first + len(block)
            scales[first:last] = choose_scales(block, form)
            errors = torch.empty_like(block)
            for i in range(len(block)):
                row, at = block[i], first + i
                scale = scales[at].unsqueeze(-1)
                whole_numbers = integers(row, scale, form)
                q[at] = whole_numbers.to(torch.int8)
                errors[i] = (row - scale * whole_numbers) / follow[at, at]
                block[i + 1 :] -= follow[at, at + 1 : last, None, None] * errors[i]
            spread = follow[first:last, last:].t() @ errors.flatten(1)
            rest[last:] -= spread.unflatten(1, rest.shape[1:])
        back = order.argsort()
        return scales[back], q[back]

    def _factor(self, moments: Tensor) -> Tensor:
        """U [k, k] float32: upper triangular, UᵀU = (moments + λI)⁻¹."""
        matrix = moments.double()
        mean = matrix.diagonal().mean()
        damp = self.damp * mean if mean > 0.0 else torch.ones_like(mean)
        matrix.diagonal().add_(damp)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(matrix))
        factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
        return factor.to(torch.float32)
