"""sparse_group: two or three weights that read the same hidden state (q, k, v), in one launch.

One grid over the column tiles of all weights; a program finds out which weight its tile belongs to
by selecting pointers and sizes, so the loop stands in the binary once. K is split as for a single
weight of all the columns together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import triton
import triton.language as tl
from wina.kernels.triton.config import Launch
from wina.kernels.triton.sparse_linear import (
    ADD_SPLITS_BLOCK_N,
    ADD_SPLITS_WARPS,
    added_tile,
    column_tile,
)

# Weights of one launch. A launch of fewer names its last one again, with no tiles of its own.
SLOTS = 3


@triton.jit
def chosen(which, first, second, third):
    """The value of slot 0, 1 or 2; pointers keep their alignment."""
    return tl.where(which == 0, first, tl.where(which == 1, second, third))


@triton.jit(do_not_specialize=[
    "T", "k_units", "n0_units", "n1_units", "n2_units", "stride0_units", "stride1_units",
    "stride2_units", "tiles0", "tiles1", "width_units", "blocks",
])  # fmt: skip
def sparse_group_kernel(
    x_ptr, w0_ptr, w1_ptr, w2_ptr, t0_ptr, t1_ptr, t2_ptr, bias0_ptr, bias1_ptr, bias2_ptr,
    scale0_ptr, scale1_ptr, scale2_ptr, y0_ptr, y1_ptr, y2_ptr, partial_ptr,
    T, k_units, n0_units, n1_units, n2_units, stride0_units, stride1_units, stride2_units,
    tiles0, tiles1, width_units, blocks,
    ALIGN: tl.constexpr, K_ALIGN: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (column tile of all weights, split): that tile of its weight's y or partial sums.

    Biases, and scales, are given for all weights or for none.
    """
    tile = tl.program_id(0)
    which = (tile >= tiles0).to(tl.int32) + (tile >= tiles0 + tiles1).to(tl.int32)
    bias_ptr = None
    if bias0_ptr is not None:
        bias_ptr = chosen(which, bias0_ptr, bias1_ptr, bias2_ptr)
    scale_ptr = None
    if scale0_ptr is not None:
        scale_ptr = chosen(which, scale0_ptr, scale1_ptr, scale2_ptr)
    column_tile(
        x_ptr, chosen(which, w0_ptr, w1_ptr, w2_ptr), None, chosen(which, t0_ptr, t1_ptr, t2_ptr),
        bias_ptr, scale_ptr, None, chosen(which, y0_ptr, y1_ptr, y2_ptr), partial_ptr,
        T, k_units * K_ALIGN, chosen(which, n0_units, n1_units, n2_units) * ALIGN,
        chosen(which, stride0_units, stride1_units, stride2_units) * ALIGN, 0,
        tile - chosen(which, 0, tiles0, tiles0 + tiles1), blocks, width_units * ALIGN,
        chosen(which, 0, n0_units, n0_units + n1_units) * ALIGN,
        SPLITS, BLOCK_T, BLOCK_K, BLOCK_N, STAGES, 0,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "n0_units", "n1_units", "n2_units", "tiles0", "tiles1",
                               "width_units"])  # fmt: skip
def add_group_splits_kernel(
    partial_ptr, bias0_ptr, bias1_ptr, bias2_ptr, y0_ptr, y1_ptr, y2_ptr,
    T, n0_units, n1_units, n2_units, tiles0, tiles1, width_units,
    ALIGN: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (column tile of all weights, token): y of its weight from the partial sums."""
    tile = tl.program_id(0)
    which = (tile >= tiles0).to(tl.int32) + (tile >= tiles0 + tiles1).to(tl.int32)
    bias_ptr = None
    if bias0_ptr is not None:
        bias_ptr = chosen(which, bias0_ptr, bias1_ptr, bias2_ptr)
    added_tile(
        partial_ptr, bias_ptr, None, chosen(which, y0_ptr, y1_ptr, y2_ptr), T,
        chosen(which, n0_units, n1_units, n2_units) * ALIGN,
        tile - chosen(which, 0, tiles0, tiles0 + tiles1), width_units * ALIGN,
        chosen(which, 0, n0_units, n0_units + n1_units) * ALIGN,
        SPLITS, BLOCK_N,
    )  # fmt: skip


def launch(
    x: Tensor,
    weights: Sequence[Tensor],
    thresholds: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    scales: Sequence[Tensor] | None,
    config: Launch,
) -> list[Tensor]:
    """y_i [T, N_i] = sparse_linear of every weight, at most 16 tokens, on x's device and stream.

    Args:
        x: [T, K], contiguous.
        weights: one to :data:`SLOTS` of [K, N_i], rows contiguous.
        thresholds: [K] float32 for each.
        biases: [N_i] for each, or None.
        scales: [T] float32 for each, or None.
        config: what :func:`wina.kernels.triton.config.choose` gives for one weight [K, Σ N_i].
    """
    T, K = x.shape
    ys = [torch.empty((T, w.shape[1]), dtype=x.dtype, device=x.device) for w in weights]
    sizes = [w.shape[1] for w in weights]
    strides = [w.stride(0) for w in weights]
    align, k_align = config.align(*sizes, *strides), config.align(K)
    block_n = config.block_n(x.itemsize)
    splits, blocks = config.splits(K)
    width = sum(sizes)
    partial = None
    if splits > 1:
        partial = torch.empty((splits, T, width), dtype=torch.float32, device=x.device)
    units = _slots([n // align for n in sizes])
    tiles = [triton.cdiv(n, block_n) for n in sizes]
    sparse_group_kernel[(sum(tiles), splits)](
        x, *_slots(weights), *_slots(thresholds), *_slots(biases), *_slots(scales), *_slots(ys),
        partial, T, K // k_align, *units, *_slots([s // align for s in strides]),
        *_own(tiles), width // align, blocks,
        ALIGN=align, K_ALIGN=k_align, SPLITS=splits, BLOCK_T=config.block_t(T),
        BLOCK_K=config.block_k, BLOCK_N=block_n, STAGES=config.stages,
        num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
    )  # fmt: skip
    if partial is not None:
        tiles = [triton.cdiv(n, ADD_SPLITS_BLOCK_N) for n in sizes]
        add_group_splits_kernel[(sum(tiles), T)](
            partial, *_slots(biases), *_slots(ys), T, *units, *_own(tiles), width // align,
            ALIGN=align, SPLITS=splits, BLOCK_N=ADD_SPLITS_BLOCK_N, num_warps=ADD_SPLITS_WARPS,
            enable_fp_fusion=True,
        )  # fmt: skip
    return ys


def _slots(values: Sequence[Any] | None) -> list[Any]:
    """One value a slot: the last one again where there are fewer, None where there are none."""
    given: list[Any] = [None] if values is None else list(values)
    return given + given[-1:] * (SLOTS - len(given))


def _own(tiles: Sequence[int]) -> list[int]:
    """Column tiles of the first two slots."""
    return [*tiles, 0][:2]
