"""How a weight is handed to a kernel: floats as they are, integers as 32-bit words."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wina.kernels.quantization import QuantizedWeight
from wina.kernels.triton.config import Launch

# Rows of integers start on cache lines, so strides are multiples of 16 elements (tile.ROW_ALIGN).
_ROW_ALIGN = 16


@dataclass(frozen=True)
class Operand:
    """A weight [K, N] as kernel arguments.

    Attributes:
        data: floats [K, N], or 32-bit words of integers.
        scales: pairs of bfloat16 as 32-bit words, None for floats.
        columns: N.
        align: largest power of two up to 16 that divides N and, for floats, the strides.
        stride_units: distance of two rows, in units of ``align`` (floats) or of 16 elements.
        scale_stride: words from one row of scales to the next.
        bits: the kernels' ``BITS``: 0 for floats.
        itemsize: bytes of one weight.
    """

    data: Tensor
    scales: Tensor | None
    columns: int
    align: int
    stride_units: int
    scale_stride: int
    bits: int
    itemsize: float


def operand(weight: Tensor | QuantizedWeight, *others: Tensor | QuantizedWeight) -> Operand:
    """The arguments for a weight; ``others`` are read by the same launch and share ``align``."""
    if isinstance(weight, QuantizedWeight):
        words = weight.packed.view(torch.int32)
        pairs = weight.scales.view(torch.int32)
        return Operand(
            words, pairs, weight.columns, Launch.align(weight.columns),
            words.stride(0) // _ROW_ALIGN, pairs.stride(0), weight.bits, weight.bits / 8,
        )  # fmt: skip
    strides = [w.stride(0) for w in (weight, *others) if isinstance(w, Tensor)]
    align = Launch.align(weight.shape[1], *strides)
    return Operand(
        weight, None, weight.shape[1], align, weight.stride(0) // align, 0, 0, weight.itemsize
    )
