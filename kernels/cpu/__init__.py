"""Compiled CPU kernels, built on first use by :mod:`wina.kernels.cpu.build`."""

import torch
from torch import Tensor

from wina.kernels import ops, quantized, reference
from wina.kernels.cpu.build import load
from wina.kernels.quantization import QuantizedWeight

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

__all__ = ["DTYPES", "dense_linear", "dense_linear_quantized", "load"]


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
