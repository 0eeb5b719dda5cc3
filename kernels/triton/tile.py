"""What every kernel is made of: the keep rule, and sums over kept channels of one column tile.

Weights are K-major: row j, contiguous, is what multiplies x_j, so a channel that no token keeps is
a row segment whose load is predicated off. Sums are float32 and their order is fixed by the launch
configuration alone: the same call gives the same bits.

Weight tiles go through shared memory by asynchronous copies, ``STAGES`` of them in flight: plain
loads of an unrolled loop look right in PTX, but ptxas sinks each one to its use and leaves a thread
one or two loads in flight. A copy that is masked off touches no memory.

Sizes along N arrive divided by ``ALIGN``, their largest common power of two up to 16 (along K by
``K_ALIGN``): multiplying inside the kernel proves to the compiler that 16-byte loads are aligned,
without a specialisation (hence a compilation) for each shape.
"""

# Kernel bodies are Triton, not Python: their arguments have no Python types.

import triton
import triton.language as tl

LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def kept(x, cut):
    """not |x| ≤ min(cut, FLT_MAX), false for no NaN and no Inf; a NaN cut keeps everything."""
    # tl.minimum would turn a NaN cut (0·inf) into FLT_MAX, which drops.
    bounded = tl.where(cut > LARGEST, LARGEST, cut)
    return (tl.abs(x) <= bounded) == 0


@triton.jit
def sum_one(
    x_ptr, w_ptr, t_ptr, factor, K, first, last, stride_k, cols, in_row,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Σ over kept j in [first, last) of x_j·w[j, cols] for one token, [BLOCK_N] float32.

    ``last`` is K, or a multiple of BLOCK_K below it. The accumulator has the shape of the weight
    tile: threads meet once, after the loop.
    """
    rows = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
    for start in tl.range(first, last, BLOCK_K, num_stages=STAGES):
        ks = start + rows
        inside = ks < K
        x = tl.load(x_ptr + ks, mask=inside, other=0.0).to(tl.float32)
        t = tl.load(t_ptr + ks, mask=inside, other=float("inf"))
        keep = inside & kept(x, t * factor)
        # A weight is read once a token: it should not push x and the thresholds out of the cache.
        w = tl.load(
            w_ptr + ks.to(tl.int64)[:, None] * stride_k + cols[None, :],
            mask=keep[:, None] & in_row[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        acc += tl.where(keep, x, 0.0)[:, None] * w.to(tl.float32)
    return tl.sum(acc, axis=0)


@triton.jit
def sum_many(
    x_ptr, w_ptr, t_ptr, factor, T, K, first, last, stride_k, cols, in_row,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The same for up to BLOCK_T tokens, each with its own mask, [BLOCK_T, BLOCK_N] float32.

    A row is loaded if any token keeps it. ``tl.dot`` because T multiply-adds a weight would not
    fit beside full bandwidth on the vector units of an A100 (kernels/README.md).
    """
    tokens = tl.arange(0, BLOCK_T)
    live = tokens < T
    rows = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for start in tl.range(first, last, BLOCK_K, num_stages=STAGES):
        ks = start + rows
        inside = ks < K
        here = live[:, None] & inside[None, :]
        x = tl.load(x_ptr + tokens[:, None] * K + ks[None, :], mask=here, other=0.0)
        t = tl.load(t_ptr + ks, mask=inside, other=float("inf"))
        keep = here & kept(x.to(tl.float32), t[None, :] * factor[:, None])
        needed = tl.max(keep.to(tl.int32), axis=0) > 0
        w = tl.load(
            w_ptr + ks.to(tl.int64)[:, None] * stride_k + cols[None, :],
            mask=needed[:, None] & in_row[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        acc = tl.dot(tl.where(keep, x, 0.0), w, acc, input_precision="ieee")
    return acc


@triton.jit
def product(
    x_ptr, w_ptr, t_ptr, scale_ptr, T, K, first, last, stride_k, cols, in_row,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Σ over kept channels for all tokens of the tile, [BLOCK_T, BLOCK_N] float32.

    ``scale_ptr`` is None where every token has the same cut-off.
    """
    tokens = tl.arange(0, BLOCK_T)
    if BLOCK_T == 1:
        factor = 1.0
        if scale_ptr is not None:
            factor = tl.load(scale_ptr)
        acc = sum_one(
            x_ptr, w_ptr, t_ptr, factor, K, first, last, stride_k, cols, in_row,
            BLOCK_K, BLOCK_N, STAGES,
        )[None, :]  # fmt: skip
    else:
        factors = tl.full((BLOCK_T,), 1.0, tl.float32)
        if scale_ptr is not None:
            factors = tl.load(scale_ptr + tokens, mask=tokens < T, other=1.0)
        acc = sum_many(
            x_ptr, w_ptr, t_ptr, factors, T, K, first, last, stride_k, cols, in_row,
            BLOCK_T, BLOCK_K, BLOCK_N, STAGES,
        )  # fmt: skip
    return acc


@triton.jit
def with_bias(acc, bias_ptr, cols, in_row):
    """acc [·, BLOCK_N] + bias; ``bias_ptr`` None adds nothing."""
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + cols, mask=in_row, other=0.0).to(tl.float32)[None, :]
    return acc
