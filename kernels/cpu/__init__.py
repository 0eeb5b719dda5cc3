"""Compiled CPU kernels, built on first use by :mod:`wina.kernels.cpu.build`."""

import torch
from torch import Tensor

from wina.kernels import ops, quantized, reference
from wina.kernels.cpu.build import load
from wina.kernels.quantization import QuantizedWeight

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Below which sparsity skipping rows is slower than reading all of a weight, by the bytes of a row
# [j, :]: of shorter rows than these, this. The first is read off `wina bench profile` of
# SmolLM2-135M (rows of 384 to 3,072 bytes), the second off `wina bench kernels --backend
# cpu,cpu-rows` on the shapes of Llama-3.2-1B, where it lies between 11 and 20 %.
BREAK_EVEN = ((4096, 0.5), (1 << 62, 0.2))
_CACHED_BYTES = 1 << 17  # smaller weights stay in a cache, where rows are not waited for

__all__ = [
    "BREAK_EVEN",
    "DTYPES",
    "break_even",
    "dense_linear",
    "dense_linear_quantized",
    "dense_linear_transposed",
    "load",
    "masked_gate_up_rows",
    "masked_linear_rows",
]


def break_even(in_features: int, out_features: int, dtype: torch.dtype) -> float:
    """The sparsity from which on the rows of a weight [K, N] are worth skipping."""
    row = out_features * dtype.itemsize
    if in_features * row < _CACHED_BYTES:
        return 0.0
    return next(sparsity for longer, sparsity in BREAK_EVEN if row < longer)


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x·weight + bias for a K-major weight [K, N].

    In 16 bits torch's own product of this layout is up to 70 times slower than ours on a CPU
    without 16-bit instructions (``kernels/README.md``), so the sparse kernel serves, keeping all.
    """
    if x.dtype == torch.float32:
        return reference.dense_linear(x, weight, bias)
    keep_all = torch.full((weight.shape[0],), -1.0, device=x.device)
    return ops.sparse_linear(x, weight, keep_all, bias)


def dense_linear_quantized(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None
) -> Tensor:
    """x·weight + bias for integers [K, N]: the sparse kernel, keeping all."""
    keep_all = torch.full((weight.packed.shape[0],), -1.0, device=x.device)
    return quantized.linear_operator(
        x, weight.packed, weight.scales, weight.columns, weight.bits, keep_all, bias
    )


def dense_linear_transposed(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x·weight + bias for the transposed view [K, N] of a row-major weight."""
    return ops.dense_linear_rows(x, weight.t(), bias)


def masked_linear_rows(
    x: Tensor,
    weight: Tensor,
    threshold: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """:func:`wina.kernels.reference.sparse_linear`, reading all of a row-major weight."""
    return ops.dense_linear_rows(x, weight.t(), bias, threshold, scale, residual)


def masked_gate_up_rows(
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
    """:func:`wina.kernels.reference.sparse_gate_up`, reading all of two row-major weights."""
    g = masked_linear_rows(x, gate, gate_threshold, gate_bias, gate_scale).float()
    u = masked_linear_rows(x, up, up_threshold, up_bias, up_scale).float()
    return (reference.ACTIVATIONS[activation](g) * u).to(x.dtype)
