"""TEAL's published algorithm (arXiv 2408.14690, section 4.3) as a kernel to compare with.

Written from the paper: one scalar threshold, masked loads of K-major rows, K split over programs
that add their float32 sums to the output atomically. One token. Unlike ours its order of addition
varies from run to run, and the output must be cleared beforehand.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# (columns, rows, warps) of a program's tile; the bench takes the fastest of them for each shape.
TILES = ((128, 16, 4), (128, 32, 4), (256, 16, 4), (256, 32, 8), (512, 16, 8), (512, 32, 8))


@triton.jit
def _kernel(
    x_ptr, w_ptr, y_ptr, cut, K, N, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    x = tl.load(x_ptr + rows, mask=rows < K, other=0.0).to(tl.float32)
    active = tl.abs(x) > cut
    w = tl.load(
        w_ptr + rows[:, None] * N + cols[None, :],
        mask=active[:, None] & (cols < N)[None, :],
        other=0.0,
        eviction_policy="evict_first",
    )
    tl.atomic_add(y_ptr + cols, tl.sum(x[:, None] * w.to(tl.float32), axis=0), mask=cols < N)


def teal_style(x: Tensor, weight: Tensor, cut: float, tile: tuple[int, int, int]) -> Tensor:
    """y [1, N] of x [1, K] and weight [K, N]: keeps |x_j| > cut.

    Args:
        x, weight: contiguous, of one dtype.
        cut: the threshold of all channels, at least 0.
        tile: one of :data:`TILES`.
    """
    K, N = weight.shape
    block_n, block_k, warps = tile
    y = torch.zeros((1, N), dtype=torch.float32, device=x.device)
    _kernel[(triton.cdiv(N, block_n), triton.cdiv(K, block_k))](
        x, weight, y, cut, K, N, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=warps
    )
    return y.to(x.dtype)
