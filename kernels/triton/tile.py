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

``BITS`` says how a weight is stored: 0 as floats of x's dtype, else as integers of so many bits
with a scale for each row and group of columns (``kernels/quantization.py``). A column tile lies in
one group, so a row's scale multiplies x_j, once for all of the tile's columns.
"""

# Kernel bodies are Triton, not Python: their arguments have no Python types.

import triton
import triton.language as tl
from wina.kernels import quantization

LARGEST = tl.constexpr(3.4028234663852886e38)
GROUP = tl.constexpr(quantization.GROUP)
# Rows of integers start on cache lines: multiples of 16 of whatever they are loaded as.
ROW_ALIGN = tl.constexpr(16)


@triton.jit
def kept(x, cut):
    """not |x| ≤ min(cut, FLT_MAX), false for no NaN and no Inf; a NaN cut keeps everything."""
    # tl.minimum would turn a NaN cut (0·inf) into FLT_MAX, which drops.
    bounded = tl.where(cut > LARGEST, LARGEST, cut)
    return (tl.abs(x) <= bounded) == 0


@triton.jit
def tile_columns(tile, BLOCK_N: tl.constexpr, BITS: tl.constexpr):
    """The columns of a tile, in the order in which they are computed."""
    i = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    if BITS == 4:
        # Within a group, nibble p of word w is column 16p + w; a word's nibbles come in a row.
        inside = i % GROUP
        i += 16 * (inside % 8) + inside // 8 - inside
    return i


@triton.jit
def row_stride(stride_units, ALIGN: tl.constexpr, BITS: tl.constexpr):
    """Distance of two rows in elements, of which the compiler knows how they are aligned."""
    return stride_units * (ALIGN if BITS == 0 else ROW_ALIGN)


@triton.jit
def floats(w_ptr, ks, needed, stride_k, cols, in_row):
    """Rows ks of the columns, [BLOCK_K, BLOCK_N]; only ``needed`` ones are read, others are 0.

    A weight is read once a token: it should not push x and the thresholds out of the cache.
    """
    return tl.load(
        w_ptr + ks.to(tl.int64)[:, None] * stride_k + cols[None, :],
        mask=needed[:, None] & in_row[None, :],
        other=0.0,
        eviction_policy="evict_first",
    )


@triton.jit
def integers(
    w_ptr, ks, needed, stride_k, tile, opaque, BLOCK_N: tl.constexpr, BITS: tl.constexpr
):  # fmt: skip
    """The same of integers q, as 1.5 + q / 2^BITS in float32, [BLOCK_K, BLOCK_N].

    A shift puts q into the upper bits of the mantissa, a mask and the bits of 1.5 make the number:
    two instructions, where a conversion takes more and runs at half the rate. (For ptxas to merge
    the mask with what follows, one of the two constants must not be known: ``opaque`` is 0, but
    not to the compiler.) Columns are in the order of :func:`tile_columns`; those past the row's
    end, and rows that are not ``needed``, are not read and hold anything.
    """
    PER_WORD: tl.constexpr = 32 // BITS
    words = tile * (BLOCK_N // PER_WORD) + tl.arange(0, BLOCK_N // PER_WORD)
    w = tl.load(
        w_ptr + ks.to(tl.int64)[:, None] * stride_k + words[None, :],
        mask=needed[:, None] & (words < stride_k)[None, :],
        other=0,
        eviction_policy="evict_first",
    )
    w = tl.join(w, w >> 16)
    w = tl.join(w, w >> 8)
    if BITS == 4:
        w = tl.join(w, w >> 4)
        # 4 bits hold q + 8, 8 bits hold q: the upper bit of 8 has to be turned over.
        w = ((w << 19) & 0x00780000) ^ (0x3F800000 ^ opaque)
    else:
        w = ((w << 15) & 0x007F8000) ^ (0x3FC00000 ^ opaque)
    return tl.reshape(w.to(tl.float32, bitcast=True), (ks.shape[0], BLOCK_N))


@triton.jit
def row_scales(
    s_ptr, ks, needed, stride_s, tile, BLOCK_N: tl.constexpr, BITS: tl.constexpr
):  # fmt: skip
    """2^BITS times the scales of rows ks in the tile's group, [BLOCK_K] float32, 0 if not needed.

    Two bfloat16 scales are loaded as one word: asynchronous copies have at least four bytes.
    """
    tl.static_assert(GROUP % BLOCK_N == 0, "a tile has one scale a row")
    group = tile * BLOCK_N // GROUP
    pair = tl.load(s_ptr + ks * stride_s + group // 2, mask=needed, other=0)
    scale = ((pair >> (16 * (group % 2))) << 16).to(tl.float32, bitcast=True)
    return scale * (1 << BITS)


@triton.jit
def sum_one(
    x_ptr, w_ptr, s_ptr, t_ptr, factor, K, first, last, stride_k, stride_s, tile, cols, in_row,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Σ over kept j in [first, last) of x_j·w[j, cols] for one token, [BLOCK_N] float32.

    ``last`` is K, or a multiple of BLOCK_K below it. The accumulator has the shape of the weight
    tile: threads meet once, after the loop.
    """
    rows = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
    coefs = tl.zeros((BLOCK_K,), tl.float32)
    for start in tl.range(first, last, BLOCK_K, num_stages=STAGES):
        ks = start + rows
        inside = ks < K
        x = tl.load(x_ptr + ks, mask=inside, other=0.0).to(tl.float32)
        t = tl.load(t_ptr + ks, mask=inside, other=float("inf"))
        keep = inside & kept(x, t * factor)
        coef = tl.where(keep, x, 0.0)
        if BITS == 0:
            acc += coef[:, None] * floats(w_ptr, ks, keep, stride_k, cols, in_row).to(tl.float32)
        else:
            coef *= row_scales(s_ptr, ks, keep, stride_s, tile, BLOCK_N, BITS)
            w = integers(w_ptr, ks, keep, stride_k, tile, stride_s >> 31, BLOCK_N, BITS)
            acc += coef[:, None] * w
            coefs += coef
    total = tl.sum(acc, axis=0)
    if BITS != 0:
        total -= 1.5 * tl.sum(coefs, axis=0)
    return total


@triton.jit
def sum_many(
    x_ptr, w_ptr, s_ptr, t_ptr, factor, T, K, first, last, stride_k, stride_s, tile, cols, in_row,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    BITS: tl.constexpr,
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
        coef = tl.where(keep, x, 0.0)
        if BITS == 0:
            w = floats(w_ptr, ks, needed, stride_k, cols, in_row)
            acc = tl.dot(coef, w, acc, input_precision="ieee")
        else:
            scales = row_scales(s_ptr, ks, needed, stride_s, tile, BLOCK_N, BITS)
            w = integers(w_ptr, ks, needed, stride_k, tile, stride_s >> 31, BLOCK_N, BITS)
            acc = dot_scaled(coef, scales, w - 1.5, acc)
    return acc


@triton.jit
def dot_scaled(x, scales, q, acc):
    """acc + (x·scales) q for q of 8 significant bits, as exact as float32 sums of exact products.

    x·scales has up to 16 significant bits in bfloat16, too many for one 16-bit operand: it is
    multiplied as the sum of two, of which the second is what rounding the first left over.
    """
    coef = x.to(tl.float32) * scales[None, :]
    if x.dtype == tl.float32:
        acc = tl.dot(coef, q, acc, input_precision="ieee")
    else:
        high = coef.to(tl.bfloat16)
        low = (coef - high.to(tl.float32)).to(tl.bfloat16)
        q = q.to(tl.bfloat16)
        acc = tl.dot(high, q, acc)
        acc = tl.dot(low, q, acc)
    return acc


@triton.jit
def product(
    x_ptr, w_ptr, s_ptr, t_ptr, scale_ptr, T, K, first, last, stride_k, stride_s, tile, cols,
    in_row,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    BITS: tl.constexpr,
):  # fmt: skip
    """Σ over kept channels for all tokens of the tile, [BLOCK_T, BLOCK_N] float32.

    Columns are those of :func:`tile_columns`, in its order. ``scale_ptr`` is None where every
    token has the same cut-off, ``s_ptr`` (the weight's scales, in pairs) where ``BITS`` is 0.
    """
    tokens = tl.arange(0, BLOCK_T)
    if BLOCK_T == 1:
        factor = 1.0
        if scale_ptr is not None:
            factor = tl.load(scale_ptr)
        acc = sum_one(
            x_ptr, w_ptr, s_ptr, t_ptr, factor, K, first, last, stride_k, stride_s, tile, cols,
            in_row, BLOCK_K, BLOCK_N, STAGES, BITS,
        )[None, :]  # fmt: skip
    else:
        factors = tl.full((BLOCK_T,), 1.0, tl.float32)
        if scale_ptr is not None:
            factors = tl.load(scale_ptr + tokens, mask=tokens < T, other=1.0)
        acc = sum_many(
            x_ptr, w_ptr, s_ptr, t_ptr, factors, T, K, first, last, stride_k, stride_s, tile,
            cols, in_row, BLOCK_T, BLOCK_K, BLOCK_N, STAGES, BITS,
        )  # fmt: skip
    return acc


@triton.jit
def with_bias(acc, bias_ptr, cols, in_row):
    """acc [·, BLOCK_N] + bias; ``bias_ptr`` None adds nothing."""
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + cols, mask=in_row, other=0.0).to(tl.float32)[None, :]
    return acc
