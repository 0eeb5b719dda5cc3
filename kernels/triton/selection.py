"""topk_scale, mean_scale, probe_scale and tracked_scale: the factor of a token's thresholds.

One program a token, no sort.

A float's bits, once those of negative numbers are turned over, are ordered as integers like the
floats themselves. So the score of any rank is found bit by bit, highest first, counting each time
how many scores lie below: 32 counts of values that stay in registers, exact, whatever the scores.
"""

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl
from wina.kernels import reference
from wina.kernels.triton.tile import kept

# Channels that a program holds in registers.
MAX_CHANNELS = 32768
_CHANNELS_PER_WARP = 1024
_MAX_WARPS = 32
TRACKED_LIMIT = tl.constexpr(reference.TRACKED_LIMIT)


@triton.jit
def turned(bits):
    """Bits of a float32 ↔ an int32 in the floats' order; its own inverse."""
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit(do_not_specialize=["k_units", "dropped"])
def topk_scale_kernel(
    x_ptr, t_ptr, scale_ptr, k_units, dropped, K_ALIGN: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Program (token): half way between the ``dropped``-th smallest score and the next one."""
    K = k_units * K_ALIGN
    token = tl.program_id(0)
    ks = tl.arange(0, BLOCK)
    inside = ks < K
    x = tl.load(x_ptr + token.to(tl.int64) * K + ks, mask=inside, other=0.0).to(tl.float32)
    score = tl.div_rn(tl.abs(x), tl.load(t_ptr + ks, mask=inside, other=1.0))
    score = tl.where(score == score, score, float("inf"))
    keys = tl.where(inside, turned(score.to(tl.int32, bitcast=True)), 0x7FFFFFFF)
    # The largest number below which at most dropped − 1 keys lie is the dropped-th smallest key.
    below_zero = tl.sum((keys < 0).to(tl.int32), axis=0)
    lower = tl.where(below_zero < dropped, 0, -2147483648)
    for i in range(31):
        candidate = lower + (tl.full((), 1, tl.int32) << (30 - i))
        below = tl.sum((keys < candidate).to(tl.int32), axis=0)
        lower = tl.where(below < dropped, candidate, lower)
    up_to = tl.sum((keys <= lower).to(tl.int32), axis=0)
    above = tl.min(tl.where(keys > lower, keys, 0x7FFFFFFF), axis=0)
    upper = tl.where(up_to > dropped, lower, above)
    ends = turned(lower).to(tl.float32, bitcast=True) + turned(upper).to(tl.float32, bitcast=True)
    tl.store(scale_ptr + token, ends * 0.5)


@triton.jit(do_not_specialize=["k_units"])
def mean_scale_kernel(x_ptr, scale_ptr, k_units, K_ALIGN: tl.constexpr, BLOCK: tl.constexpr):
    """Program (token): mean_j |x_j|."""
    K = k_units * K_ALIGN
    token = tl.program_id(0)
    ks = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + token.to(tl.int64) * K + ks, mask=ks < K, other=0.0).to(tl.float32)
    tl.store(scale_ptr + token, tl.div_rn(tl.sum(tl.abs(x), axis=0), K.to(tl.float32)))


@triton.jit(do_not_specialize=["k_units"])
def probe_scale_kernel(
    x_ptr, probe_ptr, scale_ptr, k_units, limit, K_ALIGN: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Program (token): exp(a·x + b), the exponent within ±limit; NaN stays NaN."""
    K = k_units * K_ALIGN
    token = tl.program_id(0)
    ks = tl.arange(0, BLOCK)
    inside = ks < K
    x = tl.load(x_ptr + token.to(tl.int64) * K + ks, mask=inside, other=0.0).to(tl.float32)
    p = tl.load(probe_ptr + ks, mask=inside, other=0.0)
    exponent = tl.sum(x * p, axis=0) + tl.load(probe_ptr + K)
    exponent = tl.where(exponent > limit, limit, exponent)
    exponent = tl.where(exponent < -limit, -limit, exponent)
    tl.store(scale_ptr + token, tl.exp(exponent))


@triton.jit(do_not_specialize=["k_units", "sparsity", "rate"])
def tracked_scale_kernel(
    x_ptr, t_ptr, state_ptr, own_ptr, scale_ptr, k_units, sparsity, rate,
    K_ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (sequence, of which this is one token): its factor, and its state moved."""
    K = k_units * K_ALIGN
    token = tl.program_id(0)
    ks = tl.arange(0, BLOCK)
    inside = ks < K
    state = tl.load(state_ptr + token)
    factor = tl.exp(state)
    if own_ptr is not None:
        factor *= tl.load(own_ptr + token)
    x = tl.load(x_ptr + token.to(tl.int64) * K + ks, mask=inside, other=0.0).to(tl.float32)
    t = tl.load(t_ptr + ks, mask=inside, other=float("inf"))
    keep = inside & kept(x, t * factor)
    share = tl.sum(keep.to(tl.int32), axis=0).to(tl.float32) / K.to(tl.float32)
    state += rate * (sparsity - 1.0 + share)
    state = tl.where(state > TRACKED_LIMIT, TRACKED_LIMIT, state)
    state = tl.where(state < -TRACKED_LIMIT, -TRACKED_LIMIT, state)
    tl.store(state_ptr + token, state)
    tl.store(scale_ptr + token, factor)


def launch_topk(x: Tensor, threshold: Tensor, dropped: int) -> Tensor:
    """[T] float32: the cut-offs of x [T, K], contiguous, by scores |x|/threshold [K]."""
    T, K = x.shape
    scale = torch.empty(T, dtype=torch.float32, device=x.device)
    align, block, warps = tile_of(K)
    topk_scale_kernel[(T,)](
        x, threshold, scale, K // align, dropped, K_ALIGN=align, BLOCK=block, num_warps=warps
    )
    return scale


def launch_mean(x: Tensor) -> Tensor:
    """[T] float32: the mean magnitudes of x [T, K], contiguous."""
    T, K = x.shape
    scale = torch.empty(T, dtype=torch.float32, device=x.device)
    align, block, warps = tile_of(K)
    mean_scale_kernel[(T,)](x, scale, K // align, K_ALIGN=align, BLOCK=block, num_warps=warps)
    return scale


def launch_probe(x: Tensor, probe: Tensor, limit: float) -> Tensor:
    """[T] float32: exp(a·x + b) of x [T, K], contiguous, by a probe [K + 1]."""
    T, K = x.shape
    scale = torch.empty(T, dtype=torch.float32, device=x.device)
    align, block, warps = tile_of(K)
    probe_scale_kernel[(T,)](
        x, probe, scale, K // align, limit, K_ALIGN=align, BLOCK=block, num_warps=warps
    )
    return scale


def launch_tracked(
    x: Tensor, threshold: Tensor, state: Tensor, sparsity: float, rate: float, own: Tensor | None
) -> Tensor:
    """[B] float32: the factors of x [B, K], contiguous, a token each of B sequences.

    Args:
        x: hidden states.
        threshold: [K] float32.
        state: [B] float32, contiguous; written to.
        sparsity, rate: see :func:`wina.kernels.reference.tracked_scale`.
        own: factors [B] float32 of another rule, or None.
    """
    T, K = x.shape
    scale = torch.empty(T, dtype=torch.float32, device=x.device)
    align, block, warps = tile_of(K)
    tracked_scale_kernel[(T,)](
        x, threshold, state, own, scale, K // align, sparsity, rate, K_ALIGN=align, BLOCK=block,
        num_warps=warps,
    )  # fmt: skip
    return scale


def tile_of(K: int) -> tuple[int, int, int]:
    """(alignment of a row, its channels rounded up to a power of two, warps)."""
    block = triton.next_power_of_2(K)
    return 16 if K % 16 == 0 else 1, block, max(1, min(_MAX_WARPS, block // _CHANNELS_PER_WARP))
