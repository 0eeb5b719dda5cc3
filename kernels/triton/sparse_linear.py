"""sparse_linear: one weight, 1 to 16 tokens.

One pass where column tiles alone fill the card; else K is split, every split writes float32
partial sums, and a second kernel adds them in order: deterministic, and no atomics.
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


@triton.jit
def column_tile(
    x_ptr, w_ptr, s_ptr, t_ptr, bias_ptr, scale_ptr, residual_ptr, y_ptr, partial_ptr,
    T, K, N, stride_k, stride_s, tile, blocks, width, offset,
    SPLITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """One column tile of y [T, N], or of this split's float32 partial sums.

    Partial sums are [SPLITS, T, width], this weight's columns from ``offset`` on.
    """
    cols = tile_columns(tile, BLOCK_N, BITS)
    in_row = cols < N
    split = tl.program_id(1)
    rows = blocks * BLOCK_K
    first = split * rows
    last = tl.minimum(first + rows, K)
    acc = product(
        x_ptr, w_ptr, s_ptr, t_ptr, scale_ptr, T, K, first, last, stride_k, stride_s, tile, cols,
        in_row, BLOCK_T, BLOCK_K, BLOCK_N, STAGES, BITS,
    )  # fmt: skip
    tokens = tl.arange(0, BLOCK_T)
    mask = (tokens < T)[:, None] & in_row[None, :]
    if SPLITS == 1:
        at = tokens[:, None] * N + cols[None, :]
        acc = with_bias(acc, bias_ptr, cols, in_row)
        if residual_ptr is not None:
            acc += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=mask)
    else:
        at = (split * T + tokens[:, None]) * width + offset + cols[None, :]
        tl.store(partial_ptr + at, acc, mask=mask)


@triton.jit
def added_tile(
    partial_ptr, bias_ptr, residual_ptr, y_ptr, T, N, tile, width, offset,
    SPLITS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One column tile of a token's y: Σ partial sums in order of the split (+ bias, residual)."""
    cols = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    in_row = cols < N
    token = tl.program_id(1)
    acc = tl.zeros((BLOCK_N,), tl.float32)
    for split in tl.static_range(SPLITS):
        at = (split * T + token) * width + offset + cols
        acc += tl.load(partial_ptr + at, mask=in_row, other=0.0)
    at = token * N + cols
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + cols, mask=in_row, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + at, mask=in_row, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=in_row)


@triton.jit(do_not_specialize=["T", "k_units", "n_units", "stride_units", "stride_s", "blocks"])
def sparse_linear_kernel(
    x_ptr, w_ptr, s_ptr, t_ptr, bias_ptr, scale_ptr, residual_ptr, y_ptr, partial_ptr,
    T, k_units, n_units, stride_units, stride_s, blocks,
    ALIGN: tl.constexpr, K_ALIGN: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    BITS: tl.constexpr,
):  # fmt: skip
    """Program (column tile, split): y, or the split's float32 partial sums [SPLITS, T, N]."""
    N = n_units * ALIGN
    column_tile(
        x_ptr, w_ptr, s_ptr, t_ptr, bias_ptr, scale_ptr, residual_ptr, y_ptr, partial_ptr,
        T, k_units * K_ALIGN, N, row_stride(stride_units, ALIGN, BITS), stride_s,
        tl.program_id(0), blocks, N, 0, SPLITS, BLOCK_T, BLOCK_K, BLOCK_N, STAGES, BITS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "n_units"])
def add_splits_kernel(
    partial_ptr, bias_ptr, residual_ptr, y_ptr, T, n_units,
    ALIGN: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (column tile, token): y = Σ partial sums in order of the split (+ bias, residual)."""
    N = n_units * ALIGN
    added_tile(
        partial_ptr, bias_ptr, residual_ptr, y_ptr, T, N, tl.program_id(0), N, 0, SPLITS, BLOCK_N
    )


ADD_SPLITS_BLOCK_N = 256
ADD_SPLITS_WARPS = 2


def launch(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    threshold: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    config: Launch,
    residual: Tensor | None = None,
) -> Tensor:
    """y [T, N] = sparse_linear (+ residual) of at most 16 tokens, on x's device and stream.

    Args:
        x: [T, K], contiguous.
        weight: [K, N], rows contiguous, or quantized.
        threshold: [K] float32.
        bias: [N] or None.
        scale: [T] float32 or None.
        config: what :func:`wina.kernels.triton.config.choose` gives for this call.
        residual: [T, N], contiguous, or None.
    """
    T, K = x.shape
    w = operand(weight)
    N = w.columns
    y = torch.empty((T, N), dtype=x.dtype, device=x.device)
    align, k_align = w.align, config.align(K)
    block_n = config.block_n(w.itemsize)
    splits, blocks = config.splits(K)
    partial = None
    if splits > 1:
        partial = torch.empty((splits, T, N), dtype=torch.float32, device=x.device)
    sparse_linear_kernel[(triton.cdiv(N, block_n), splits)](
        x, w.data, w.scales, threshold, bias, scale, residual, y, partial,
        T, K // k_align, N // align, w.stride_units, w.scale_stride, blocks,
        ALIGN=align, K_ALIGN=k_align, SPLITS=splits, BLOCK_T=config.block_t(T),
        BLOCK_K=config.block_k, BLOCK_N=block_n, STAGES=config.stages, BITS=w.bits,
        num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
    )  # fmt: skip
    if partial is not None:
        align = config.align(N)
        add_splits_kernel[(triton.cdiv(N, ADD_SPLITS_BLOCK_N), T)](
            partial, bias, residual, y, T, N // align,
            ALIGN=align, SPLITS=splits, BLOCK_N=ADD_SPLITS_BLOCK_N, num_warps=ADD_SPLITS_WARPS,
            enable_fp_fusion=True,
        )  # fmt: skip
    return y
