"""Operators that calibration counts with: over all channels of many tokens, in one pass each.

They are of no use at run time. ``count_scores`` is behind every quantile, ``kept_sums`` behind
allocation by gradients, ``mask_backward`` behind thresholds that are learned.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from wina.kernels import ops
from wina.kernels.ops import Arguments

# float32 bit patterns without the sign, truncated to 8 exponent and 7 mantissa bits.
SHIFT = 16
BINS = 1 << 15
_SMALLEST_SCALE = 1e-30
# Beyond it the native kernel's logarithm is not exact to float32 any more.
_WIDEST = 0.5
_LARGEST = torch.finfo(torch.float32).max


def bins_of(scores: Tensor) -> Tensor:
    """The bin of the size of every score (float32), flat int32; NaN and Inf are in the last 128."""
    bits = scores.contiguous().view(torch.int32).flatten()
    return (bits & 0x7FFFFFFF) >> SHIFT


def count_scores(x: Tensor, constants: Tensor, scale: Tensor | None = None) -> Tensor:
    """How many channels have a score |x_j|·c_j/scale in each bin of :func:`bins_of`.

    Args:
        x: hidden states [..., K].
        constants: c [K] float32, ≥ 0.
        scale: factor of each token's thresholds, [...] float32; None for 1.

    Returns:
        [:data:`BINS`] int64.
    """
    scores = x.abs().to(torch.float32) * constants.to(torch.float32)
    if scale is not None:
        scores = scores / scale.clamp_min(_SMALLEST_SCALE).unsqueeze(-1)
    return torch.bincount(bins_of(scores), minlength=BINS)


def kept_sums(x: Tensor, gradient: Tensor, constants: Tensor, cutoffs: Tensor) -> Tensor:
    """Σ_j x_j·g_j over the channels whose score is above each of some cut-offs.

    Args:
        x: hidden states [..., K].
        gradient: g, of the shape and dtype of x.
        constants: c [K] float32, ≥ 0; a score is |x_j|·c_j.
        cutoffs: [n] float32, not decreasing; a negative one keeps every channel.

    Returns:
        [..., n] float32.
    """
    scores = x.abs().to(torch.float32) * constants.to(torch.float32)
    products = x.to(torch.float32) * gradient.to(torch.float32)
    # Masks are nested: what is above i of the cut-offs is in the first i sums.
    above = torch.zeros_like(scores, dtype=torch.int16)
    for cutoff in cutoffs.to(torch.float32):
        above += ~(scores <= cutoff)
    sums = products.new_zeros((*x.shape[:-1], len(cutoffs) + 1))
    sums.scatter_add_(-1, above.long(), products)
    return sums.flip(-1).cumsum(-1).flip(-1)[..., 1:]


def mask_backward(
    x: Tensor, gradient: Tensor, threshold: Tensor, scale: Tensor, width: float
) -> tuple[Tensor, Tensor]:
    """The gradient before a mask, and what moving the mask's thresholds would do.

    Raising log t_j by ε drops the tokens with log t_j < log|x_j|/scale ≤ log t_j + ε. How many
    these are, and what each costs, is estimated with a triangular kernel around the threshold.
    Where t_j·scale is 0 everything is kept and there is no slope.

    Args:
        x: what was masked [..., K].
        gradient: ∂loss/∂(masked x), of the shape and dtype of x.
        threshold: t [K] float32, ≥ 0.
        scale: factor of each token's thresholds, [...] float32; a token with 0 does not count.
        width: of the kernel, to either side, in log |x|; at most 0.5.

    Returns:
        ∂loss/∂x, as the gradient; and [3, K] float32: Σ over tokens of kernel·gradient·x, of the
        kernel, and of the tokens that keep the channel. The kernel has the height 1/width.
    """
    wide, slope = x.to(torch.float32), gradient.to(torch.float32)
    each, factor = threshold.to(torch.float32), scale.to(torch.float32).unsqueeze(-1)
    cut = (each * factor).clamp(max=_LARGEST)
    keep = ~(wide.abs() <= cut) | (cut == 0.0)
    ratio = wide.abs() * _inverse(each) * _inverse(factor)
    near = (width - ratio.log().abs()).clamp_min(0.0) / width**2
    tokens = (factor > 0.0).expand_as(keep)
    sums = [near * slope * wide, near, (keep & tokens).to(torch.float32)]
    return gradient * keep, torch.stack([one.reshape(-1, x.shape[-1]).sum(0) for one in sums])


def _inverse(x: Tensor) -> Tensor:
    """1/x where x is positive, else 0."""
    return torch.where(x > 0.0, 1.0 / x, 0.0)


def _check_floats(name: str, given: Tensor, length: int) -> None:
    if given.shape != (length,) or given.dtype != torch.float32:
        raise RuntimeError(
            f"{name} must be [{length}] float32, got {list(given.shape)} {given.dtype}"
        )


def _check_gradient(a: Arguments) -> None:
    ops.check_x(a)
    if a.gradient.shape != a.x.shape or a.gradient.dtype != a.x.dtype:
        raise RuntimeError(
            f"gradient must be {tuple(a.x.shape)} {a.x.dtype} as x is, got "
            f"{tuple(a.gradient.shape)} {a.gradient.dtype}"
        )


def _check_count(a: Arguments) -> None:
    ops.check_x(a)
    _check_floats("constants", a.constants, a.x.shape[-1])
    ops.check_of_tokens(a.x, "scale", a.scale, torch.float32)


def _check_sums(a: Arguments) -> None:
    _check_gradient(a)
    _check_floats("constants", a.constants, a.x.shape[-1])
    _check_floats("cutoffs", a.cutoffs, a.cutoffs.numel())


def _check_backward(a: Arguments) -> None:
    _check_gradient(a)
    _check_floats("threshold", a.threshold, a.x.shape[-1])
    ops.check_of_tokens(a.x, "scale", a.scale, torch.float32)
    if not 0.0 < a.width <= _WIDEST:
        raise RuntimeError(f"width must be in (0, {_WIDEST}], got {a.width}")


count_operator: Callable[..., Tensor] = ops.define(
    count_scores, _check_count, lambda a: a.x.new_empty(BINS, dtype=torch.int64)
)
sums_operator: Callable[..., Tensor] = ops.define(
    kept_sums,
    _check_sums,
    lambda a: a.x.new_empty((*a.x.shape[:-1], len(a.cutoffs)), dtype=torch.float32),
)
backward_operator: Callable[..., tuple[Tensor, Tensor]] = ops.define(
    mask_backward,
    _check_backward,
    lambda a: (
        a.gradient.new_empty(a.gradient.shape),
        a.x.new_empty((3, a.x.shape[-1]), dtype=torch.float32),
    ),
)
