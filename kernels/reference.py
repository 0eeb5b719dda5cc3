"""The definition of every operator, in plain torch.

All other backends must equal these functions up to rounding. They work on any device, dtype and
number of tokens, can be traced by ``torch.compile`` and are differentiable in x, weight and bias
(the mask is a constant of the gradient).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_LARGEST = torch.finfo(torch.float32).max

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


def keep_mask(x: Tensor, threshold: Tensor, scale: Tensor | None = None) -> Tensor:
    """Which channels of x are active: not |x_tj| ≤ min(threshold_j·scale_t, FLT_MAX).

    Written with ``not`` and bounded by the largest float32 so that NaN and Inf are always active
    and show up in the output as they would in a dense layer.

    Args:
        x: hidden states [..., K].
        threshold: [K] float32; −1 keeps a channel, +inf drops it.
        scale: per-token factor of the thresholds, [...] float32, ≥ 0.

    Returns:
        Boolean [..., K].
    """
    cut = threshold if scale is None else threshold * scale.unsqueeze(-1)
    return ~(x.abs() <= cut.clamp(max=_LARGEST))


def mask_inputs(x: Tensor, threshold: Tensor, scale: Tensor | None = None) -> Tensor:
    """x with its inactive channels set to zero, [..., K]."""
    return torch.where(keep_mask(x, threshold, scale), x, 0.0)


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x·weight + bias for x [..., K], weight [K, N]: what a patched layer does when dense."""
    return F.linear(x, weight.t(), bias)


def sparse_linear(
    x: Tensor,
    weight: Tensor,
    threshold: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """y_t = Σ over active j of x_tj·weight[j, :] + bias.

    Args:
        x: hidden states [..., K].
        weight: K-major weight [K, N]: row j is what multiplies x_j.
        threshold: see :func:`keep_mask`.
        bias: [N] or None.
        scale: see :func:`keep_mask`.

    Returns:
        [..., N] in the dtype of x.
    """
    return F.linear(mask_inputs(x, threshold, scale), weight.t(), bias)


def sparse_gate_up(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    gate_threshold: Tensor,
    up_threshold: Tensor,
    activation: str,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    gate_scale: Tensor | None = None,
    up_scale: Tensor | None = None,
) -> Tensor:
    """h = activation(sparse_linear(x, gate)) · sparse_linear(x, up): the inside of a gated MLP.

    Args:
        x: hidden states [..., K].
        gate, up: K-major weights [K, N].
        gate_threshold, up_threshold: [K] float32, one mask for each product.
        activation: a key of :data:`ACTIVATIONS`.
        gate_bias, up_bias: [N] or None.
        gate_scale, up_scale: per-token factors [...] float32 or None.

    Returns:
        [..., N] in the dtype of x.
    """
    g = sparse_linear(x, gate, gate_threshold, gate_bias, gate_scale)
    u = sparse_linear(x, up, up_threshold, up_bias, up_scale)
    return ACTIVATIONS[activation](g) * u
