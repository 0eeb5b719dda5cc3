"""Random calls of the operators, their exact results, and the error that a kernel may make."""

from __future__ import annotations

import torch
from torch import Tensor

from wina.kernels import quantization, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def case(
    T: int, K: int, N: int, dtype: torch.dtype, sparsity: float, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, K], weight [K, N], threshold [K] that drops about ``sparsity`` of the channels."""
    generator = torch.Generator().manual_seed(seed + 7 * T + 11 * K + 13 * N)
    x = torch.randn(T, K, generator=generator).to(dtype)
    weight = torch.randn(K, N, generator=generator).to(dtype)
    c = torch.rand(K, generator=generator) + 0.5
    scores = (x.abs().float() * c).flatten()
    if sparsity == 0:
        threshold = torch.full((K,), -1.0)
    elif sparsity == 1:
        threshold = torch.full((K,), torch.inf)
    else:
        threshold = scores.quantile(sparsity) / c if scores.numel() else torch.zeros(K)
    return x, weight, threshold


def exact(
    x: Tensor,
    weight: Tensor,
    threshold: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The definition in float64, from the mask that float32 comparison gives."""
    keep = reference.keep_mask(x, threshold, scale)
    y = torch.where(keep, x, 0.0).double() @ weight.double()
    for added in (bias, residual):
        y = y if added is None else y + added.double()
    return y


def assert_equal_up_to_rounding(got: Tensor, want: Tensor, x: Tensor, weight: Tensor) -> None:
    """|error| ≤ one rounding of the output + float32 accumulation over K terms."""
    assert got.dtype == x.dtype
    bound = x.double().abs() @ weight.double().abs()
    tolerance = torch.finfo(x.dtype).eps * want.abs() + 3e-6 * bound + 1e-7
    assert ((got.double() - want).abs() <= tolerance).all()


def full_scale(weight: quantization.QuantizedWeight) -> Tensor:
    """The largest weight that each group could hold, [K, N]: what float32 sums are exact to."""
    largest = weight.scales.float().abs() * 2 ** (weight.bits - 1)
    return largest.repeat_interleave(quantization.GROUP, dim=1)[:, : weight.columns]
