"""sparse_gate_up: both products of a gated MLP, activation and multiply, in one launch.

A program owns a column tile of gate and up over all of K, so h is written once and nothing else
is: the products follow each other in the program, with one accumulator alive at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl
from wina.kernels.quantization import QuantizedWeight
from wina.kernels.triton.config import Launch
from wina.kernels.triton.operand import operand
from wina.kernels.triton.tile import product, row_stride, tile_columns, with_bias

SQRT_HALF = tl.constexpr(0.7071067811865476)
SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """reference.ACTIVATIONS[ACTIVATION](x) in float32; NaN stays NaN."""
    if ACTIVATION == "silu":
        y = x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * SQRT_HALF))
    elif ACTIVATION == "gelu_tanh":
        # 1 + tanh(z) = 2/(1 + exp(−2z)): finite for every finite z.
        z = SQRT_2_OVER_PI * (x + 0.044715 * x * x * x)
        y = x / (1.0 + tl.exp(-2.0 * z))
    else:
        tl.static_assert(ACTIVATION == "relu" or ACTIVATION == "relu2", "no such activation")
        y = tl.where(x <= 0.0, 0.0, x)
        if ACTIVATION == "relu2":
            y = y * y
    return y


@triton.jit(
    do_not_specialize=[
        "T", "k_units", "n_units", "gate_stride_units", "up_stride_units", "stride_s",
    ]
)  # fmt: skip
def gate_up_kernel(
    x_ptr, gate_ptr, up_ptr, gate_s_ptr, up_s_ptr, gate_t_ptr, up_t_ptr, gate_bias_ptr,
    up_bias_ptr, gate_scale_ptr, up_scale_ptr, h_ptr,
    T, k_units, n_units, gate_stride_units, up_stride_units, stride_s,
    ALIGN: tl.constexpr, K_ALIGN: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    BITS: tl.constexpr,
):  # fmt: skip
    """Program (column tile): h [T, BLOCK_N] = activation(gate product)·(up product)."""
    K = k_units * K_ALIGN
    N = n_units * ALIGN
    tile = tl.program_id(0)
    cols = tile_columns(tile, BLOCK_N, BITS)
    in_row = cols < N
    g = product(
        x_ptr, gate_ptr, gate_s_ptr, gate_t_ptr, gate_scale_ptr, T, K, 0, K,
        row_stride(gate_stride_units, ALIGN, BITS), stride_s, tile, cols, in_row,
        BLOCK_T, BLOCK_K, BLOCK_N, STAGES, BITS,
    )  # fmt: skip
    g = activate(with_bias(g, gate_bias_ptr, cols, in_row), ACTIVATION)
    u = product(
        x_ptr, up_ptr, up_s_ptr, up_t_ptr, up_scale_ptr, T, K, 0, K,
        row_stride(up_stride_units, ALIGN, BITS), stride_s, tile, cols, in_row,
        BLOCK_T, BLOCK_K, BLOCK_N, STAGES, BITS,
    )  # fmt: skip
    u = with_bias(u, up_bias_ptr, cols, in_row)
    tokens = tl.arange(0, BLOCK_T)
    at = tokens[:, None] * N + cols[None, :]
    mask = (tokens < T)[:, None] & in_row[None, :]
    tl.store(h_ptr + at, (g * u).to(h_ptr.dtype.element_ty), mask=mask)


def launch(
    x: Tensor,
    gate: Tensor | QuantizedWeight,
    up: Tensor | QuantizedWeight,
    gate_threshold: Tensor,
    up_threshold: Tensor,
    activation: str,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    gate_scale: Tensor | None,
    up_scale: Tensor | None,
    config: Launch,
) -> Tensor:
    """h [T, N] of at most 16 tokens, on x's device and stream.

    Args:
        x: [T, K], contiguous.
        gate, up: [K, N], rows contiguous, or both quantized to the same width.
        gate_threshold, up_threshold: [K] float32.
        activation: a key of ``reference.ACTIVATIONS``.
        gate_bias, up_bias: [N] or None.
        gate_scale, up_scale: [T] float32 or None.
        config: what :func:`wina.kernels.triton.config.choose` gives for this call.
    """
    T, K = x.shape
    g, u = operand(gate, up), operand(up, gate)
    N = g.columns
    h = torch.empty((T, N), dtype=x.dtype, device=x.device)
    align, k_align = g.align, config.align(K)
    block_n = config.block_n(g.itemsize)
    gate_up_kernel[(triton.cdiv(N, block_n),)](
        x, g.data, u.data, g.scales, u.scales, gate_threshold, up_threshold,
        gate_bias, up_bias, gate_scale, up_scale, h,
        T, K // k_align, N // align, g.stride_units, u.stride_units, g.scale_stride,
        ALIGN=align, K_ALIGN=k_align, ACTIVATION=activation, BLOCK_T=config.block_t(T),
        BLOCK_K=config.block_k, BLOCK_N=block_n, STAGES=config.stages, BITS=g.bits,
        num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
    )  # fmt: skip
    return h
