"""The definition of every operator, in plain torch.

All other backends must equal these functions up to rounding. They work on any device, dtype and
number of tokens, can be traced by ``torch.compile`` and are differentiable in x, weight and bias
(the mask is a constant of the gradient).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_LARGEST = torch.finfo(torch.float32).max
# Of tracked_scale: tokens of a sequence that have one factor, and the limit of its logarithm.
TRACKED_TOKENS = 16
TRACKED_LIMIT = 1.0

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
    """x with its inactive channels set to zero, [..., K].

    A dropped channel is finite, so a product does it; `torch.where` takes four times as long on a
    CPU.
    """
    return x * keep_mask(x, threshold, scale)


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x·weight + bias for x [..., K], weight [K, N]: what a patched layer does when dense."""
    return F.linear(x, weight.t(), bias)


def dense_linear_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    threshold: Tensor | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """y = residual + W·x + bias for a row-major W, all of which is read: an ``lm_head``, another
    linear that is not patched, or, with thresholds, one whose rows are not worth skipping.

    Args:
        x: hidden states [..., K].
        weight: [N, K] as ``nn.Linear`` keeps it, so that an embedding can share it.
        bias: [N] or None.
        threshold, scale: inactive channels of x count as zero, see :func:`keep_mask`; None for
            none of them.
        residual: [..., N] in the dtype of x, or None. Kernels for few tokens add it before their
            one rounding.

    Returns:
        [..., N] in the dtype of x.
    """
    y = F.linear(x if threshold is None else mask_inputs(x, threshold, scale), weight, bias)
    return y if residual is None else residual + y


def sparse_linear(
    x: Tensor,
    weight: Tensor,
    threshold: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """y_t = residual_t + Σ over active j of x_tj·weight[j, :] + bias.

    Args:
        x: hidden states [..., K].
        weight: K-major weight [K, N]: row j is what multiplies x_j.
        threshold: see :func:`keep_mask`.
        bias: [N] or None.
        scale: see :func:`keep_mask`.
        residual: [..., N] in the dtype of x, or None. Kernels add it before their one rounding;
            here, in 16 bits, the product has been rounded before.

    Returns:
        [..., N] in the dtype of x.
    """
    y = F.linear(mask_inputs(x, threshold, scale), weight.t(), bias)
    return y if residual is None else residual + y


def sparse_group(
    x: Tensor,
    weights: Sequence[Tensor],
    thresholds: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    scales: Sequence[Tensor | None],
) -> list[Tensor]:
    """sparse_linear of several weights that read the same hidden state, such as q, k and v.

    Args:
        x: hidden states [..., K].
        weights: K-major weights [K, N_i].
        thresholds, biases, scales: of each weight, see :func:`sparse_linear`.

    Returns:
        [..., N_i] for each weight, in the dtype of x.
    """
    return [sparse_linear(x, *one) for one in zip(weights, thresholds, biases, scales, strict=True)]


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


def topk_scale(x: Tensor, threshold: Tensor, dropped: int) -> Tensor:
    """The cut-off of every token's scores |x_j|/threshold_j that drops ``dropped`` channels.

    It lies half way between the last score kept and the first one dropped, so that rounding in
    |x_j| ≤ threshold_j·scale cannot move a channel across it. A NaN scores +inf.

    Args:
        x: hidden states [..., K].
        threshold: [K] float32: 1/c.
        dropped: in [1, K − 1].

    Returns:
        [...] float32.
    """
    scores = x.abs().to(torch.float32) / threshold
    scores = torch.where(scores.isnan(), torch.inf, scores)
    # Of the smallest dropped + 1 scores, the two largest are either side of the cut.
    smallest = scores.topk(dropped + 1, dim=-1, largest=False).values
    return (smallest[..., dropped - 1] + smallest[..., -1]) / 2


def mean_scale(x: Tensor) -> Tensor:
    """mean_j |x_j| of every token of x [..., K]: [...] float32."""
    return x.abs().mean(dim=-1, dtype=torch.float32)


def probe_scale(x: Tensor, probe: Tensor, limit: float) -> Tensor:
    """exp(a·x + b) of every token, the exponent within ±limit. A NaN in x gives NaN.

    Args:
        x: hidden states [..., K].
        probe: [K + 1] float32: a, then b.
        limit: of the exponent, positive.

    Returns:
        [...] float32.
    """
    exponent = x.to(torch.float32) @ probe[:-1] + probe[-1]
    return exponent.clamp(-limit, limit).exp()


def tracked_scale(
    x: Tensor,
    threshold: Tensor,
    state: Tensor,
    sparsity: float,
    rate: float,
    scale: Tensor | None = None,
    counted: Tensor | None = None,
) -> Tensor:
    """Factors that keep the share of dropped channels at ``sparsity`` on the text at hand.

    Each sequence has a factor exp(s) of its thresholds. A token that drops a share d moves s by
    rate·(sparsity − d), s within ±:data:`TRACKED_LIMIT`; in a forward of several tokens s moves
    after every :data:`TRACKED_TOKENS` of them, by their sum. This is the stochastic approximation
    of a quantile (Robbins and Monro 1951) with a step that stays, since texts change. A
    sequence of T tokens whose s ends at s_T has dropped sparsity − s_T/(rate·T) in the mean.

    Args:
        x: hidden states [..., S, K] of B sequences, or [K].
        threshold: see :func:`keep_mask`.
        state: s of every sequence, [B] float32; written to.
        sparsity: share of channels to drop.
        rate: of the step, positive.
        scale: factors [...] float32 of another rule, which these multiply; None for 1.
        counted: boolean [...], False where a token says nothing (padding); None for all.

    Returns:
        [...] float32.
    """
    rows = x.flatten(0, -2) if x.dim() > 1 else x[None]
    tokens = len(rows) // max(1, len(state))
    rows = rows.unflatten(0, (len(state), tokens))
    base = rows.new_ones(rows.shape[:2], dtype=torch.float32)
    own = base if scale is None else scale.reshape(rows.shape[:2])
    used = base if counted is None else counted.reshape(rows.shape[:2]).to(torch.float32)
    parts = []
    for first in range(0, tokens, TRACKED_TOKENS):
        now = slice(first, first + TRACKED_TOKENS)
        factor = own[:, now] * state.exp().unsqueeze(1)
        parts.append(factor)
        kept = torch.count_nonzero(keep_mask(rows[:, now], threshold, factor), dim=-1)
        surplus = (sparsity - 1.0 + kept / rows.shape[-1]) * used[:, now]
        state.add_(rate * surplus.sum(1)).clamp_(-TRACKED_LIMIT, TRACKED_LIMIT)
    return torch.cat([*parts, base[:, :0]], dim=1).reshape(x.shape[:-1])
