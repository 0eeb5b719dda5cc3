"""Operators on integer weights: ``torch.ops.wina.sparse_linear_quantized`` and the gated pair.

They mean what ``sparse_linear`` and ``sparse_gate_up`` mean on the dequantized weight, with float32
products, sums and activation, rounded to x's dtype once. A weight arrives as the fields of a
:class:`~wina.kernels.quantization.QuantizedWeight`, since an operator takes tensors and numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from wina.kernels import ops, reference
from wina.kernels.ops import Arguments
from wina.kernels.quantization import (
    FORMATS,
    GROUP,
    QuantizedWeight,
    check_layout,
    dequantize,
    groups_of,
)

# Groups of columns that are dequantized at a time: bounds the float copy of a large weight.
_BLOCK_GROUPS = 16


def multiply(x: Tensor, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x·weight + bias for x [..., K], [..., N] in ``dtype``, to which the weight is rounded."""
    x = x.to(dtype)
    parts = []
    for first in range(0, max(1, groups_of(weight.columns)), _BLOCK_GROUPS):
        block = columns_from(weight, first, _BLOCK_GROUPS)
        columns = slice(first * GROUP, first * GROUP + block.columns)
        part = None if bias is None else bias[columns].to(dtype)
        parts.append(F.linear(x, block.dequantize().to(dtype).t(), part))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def dense_linear_quantized(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None
) -> Tensor:
    """x·weight + bias for x [..., K], multiplied in x's dtype: what many tokens take on a GPU."""
    return multiply(x, weight, bias, x.dtype)


def columns_from(weight: QuantizedWeight, first: int, groups: int) -> QuantizedWeight:
    """A view of ``groups`` groups of columns, or of those that there are, from group ``first``."""
    width = GROUP * weight.bits // 8
    return QuantizedWeight(
        weight.packed[:, first * width : (first + groups) * width],
        weight.scales[:, first : first + groups],
        min(groups * GROUP, weight.columns - first * GROUP),
        weight.bits,
    )


def sparse_linear_quantized(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    columns: int,
    bits: int,
    threshold: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """y_t = residual_t + Σ over active j of x_tj·w[j, :] + bias for an integer weight w.

    Args:
        x: hidden states [..., K].
        packed, scales, columns, bits: the fields of a QuantizedWeight [K, N], N = ``columns``.
        threshold, scale: see :func:`wina.kernels.reference.keep_mask`.
        bias: [N] or None.
        residual: [..., N] in the dtype of x, or None.

    Returns:
        [..., N] in the dtype of x, of float32 sums (float64 for float64 x).
    """
    weight = QuantizedWeight(packed, scales, columns, bits)
    y = _product(x, weight, threshold, bias, scale)
    return (y if residual is None else residual + y).to(x.dtype)


def sparse_gate_up_quantized(
    x: Tensor,
    gate: Tensor,
    gate_scales: Tensor,
    up: Tensor,
    up_scales: Tensor,
    columns: int,
    bits: int,
    gate_threshold: Tensor,
    up_threshold: Tensor,
    activation: str,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    gate_scale: Tensor | None = None,
    up_scale: Tensor | None = None,
) -> Tensor:
    """h = activation(gate product)·(up product) for integer weights.

    Args:
        x: hidden states [..., K].
        gate, gate_scales, up, up_scales, columns, bits: the fields of two QuantizedWeights [K, N].
        gate_threshold, up_threshold, gate_scale, up_scale: see
            :func:`wina.kernels.reference.keep_mask`.
        activation: a key of :data:`wina.kernels.reference.ACTIVATIONS`.
        gate_bias, up_bias: [N] or None.

    Returns:
        [..., N] in the dtype of x.
    """
    gate_weight = QuantizedWeight(gate, gate_scales, columns, bits)
    up_weight = QuantizedWeight(up, up_scales, columns, bits)
    g = _product(x, gate_weight, gate_threshold, gate_bias, gate_scale)
    u = _product(x, up_weight, up_threshold, up_bias, up_scale)
    return (reference.ACTIVATIONS[activation](g) * u).to(x.dtype)


def _product(
    x: Tensor,
    weight: QuantizedWeight,
    threshold: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return multiply(reference.mask_inputs(x, threshold, scale), weight, bias, dtype)


def dense_linear_rows_quantized(
    x: Tensor, packed: Tensor, scales: Tensor, columns: int, bits: int, bias: Tensor | None = None
) -> Tensor:
    """y = W·x + bias for an integer W of outputs × inputs: an ``lm_head`` in 8 or 4 bits.

    Args:
        x: hidden states [..., K].
        packed, scales, columns, bits: the fields of ``quantize(W)`` for W [N, K], so that a row
            and its groups lie along K = ``columns``.
        bias: [N] or None.

    Returns:
        [..., N] in the dtype of x, of float32 sums (float64 for float64 x).
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(dtype)
    rows = _BLOCK_GROUPS * GROUP
    parts = [
        F.linear(wide, dequantize(block, block_scales, columns, bits).to(dtype))
        for block, block_scales in zip(packed.split(rows), scales.split(rows), strict=True)
    ]
    y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    return (y if bias is None else y + bias).to(x.dtype)


def check_packed(
    x: Tensor, rows: int, packed: Tensor, scales: Tensor, columns: int, bits: int
) -> None:
    """Raise a RuntimeError unless these are the fields of a QuantizedWeight of so many rows."""
    if bits not in (form.bits for form in FORMATS.values()):
        raise RuntimeError(f"expected 8 or 4 bits, got {bits} bits")
    try:
        check_layout(packed, scales, rows, columns, bits)
    except ValueError as error:
        raise RuntimeError(f"for x {tuple(x.shape)}, {error}") from None


def check_quantized(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    columns: int,
    bits: int,
    threshold: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
) -> None:
    """Raise a RuntimeError that names the argument whose shape or dtype does not fit."""
    if x.dim() < 1:
        raise RuntimeError("expected x [..., K], got a scalar")
    check_packed(x, x.shape[-1], packed, scales, columns, bits)
    # A weight of x's dtype and the right shape: the other arguments are those of sparse_linear.
    ops.check_linear(x, x.new_empty(()).expand(x.shape[-1], columns), threshold, bias, scale)


def _check_linear(a: Arguments) -> None:
    check_quantized(a.x, a.packed, a.scales, a.columns, a.bits, a.threshold, a.bias, a.scale)
    ops.check_residual(a.x, a.columns, a.residual)


def _check_dense_rows(a: Arguments) -> None:
    if a.x.dim() < 1 or a.x.shape[-1] != a.columns or a.packed.dim() != 2:
        raise RuntimeError(
            f"expected x [..., K] with K = {a.columns} columns and packed [N, row bytes], got "
            f"{tuple(a.x.shape)} and {tuple(a.packed.shape)}"
        )
    check_packed(a.x, a.packed.shape[0], a.packed, a.scales, a.columns, a.bits)
    ops.check_bias(a.x, a.packed.shape[0], a.bias)


def _check_gate_up(a: Arguments) -> None:
    check_quantized(
        a.x, a.gate, a.gate_scales, a.columns, a.bits, a.gate_threshold, a.gate_bias, a.gate_scale
    )
    check_quantized(
        a.x, a.up, a.up_scales, a.columns, a.bits, a.up_threshold, a.up_bias, a.up_scale
    )
    ops.check_activation(a.activation)


def _output(a: Arguments) -> Tensor:
    empty: Tensor = a.x.new_empty((*a.x.shape[:-1], a.columns))
    return empty


linear_operator: Callable[..., Tensor] = ops.define(sparse_linear_quantized, _check_linear, _output)
gate_up_operator: Callable[..., Tensor] = ops.define(
    sparse_gate_up_quantized, _check_gate_up, _output
)
dense_rows_operator: Callable[..., Tensor] = ops.define(
    dense_linear_rows_quantized,
    _check_dense_rows,
    lambda a: a.x.new_empty((*a.x.shape[:-1], a.packed.shape[0])),
)
