"""Queries and keys in 8 bits, before the attention kernel multiplies them (``INT8`` there).

As SageAttention does it (arXiv 2410.02367), but rotated first: with an orthogonal ``R``, the keys'
mean over the tokens ``m`` and ``c = scale * log2(e)``,

    q_r . k_j  =  R q_r . R k_j  =  R q_r . R (k_j - m)  +  R q_r . R m

The last term is the same for all keys of a row: a softmax doesn't see it, only the LSE does, to
which ``shift_r = scale * R q_r . R m`` is added at the end. What keys have in common, often most of
them, then costs no precision. ``R`` is a Hadamard matrix over the root of D, all signs: it spreads
a channel far larger than the others over all of them (QuaRot, arXiv 2404.00456). The rest is
rounded to a grid of its own unit, per row of q and of k, so that a product of units takes sums of
integers to log2:

    Q_r = round(127 R q_r / max |R q_r|)                    q_unit_r = c max |R q_r| / 127
    K_j = round(127 R (k_j - m) / max |R (k_j - m)|)        k_unit_j = max |R (k_j - m)| / 127
    c q_r . (k_j - m)  ~=  q_unit_r k_unit_j (Q_r . K_j)

Keys are read in the order of the tile map; the mean of each key tile, which stands in for the tile
where it is skipped, is left beside them. ``qk_int8.py`` has the rounding in plain PyTorch. **No GPU
has run this yet.**
"""

# ruff: noqa: N803 - compile-time arguments are capitals, as is the custom in Triton

from __future__ import annotations

import triton
import triton.language as tl

from .attend import tokens_of


@triton.jit
def quantise_queries(
    q,  # [B, H, Lq, D] fp16 or bf16; strides below, the last one is 1
    mean,  # [B, H, D] float32, contiguous: the keys' mean, rotated
    values,  # [B, H, Lq, D] int8, contiguous
    unit,  # [B, H, Lq] float32, contiguous
    shift,  # [B, H, Lq] float32, contiguous
    scale,
    q_batch,
    q_head,
    q_row,
    heads,
    lq,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program: some rows of one head. Grid ``(ceil(Lq / ROWS), B * H)``."""
    pair = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, PADDED_DIM)
    inside = (rows < lq)[:, None] & (d < HEAD_DIM)[None, :]
    q += pair // heads * q_batch + pair % heads * q_head
    x = tl.load(q + (rows.to(tl.int64) * q_row)[:, None] + d[None, :], mask=inside, other=0.0)
    x = rotated(x, HEAD_DIM, PADDED_DIM)
    m = tl.load(mean + pair * HEAD_DIM + d, mask=d < HEAD_DIM, other=0.0)
    largest = largest_of(x, 1)
    places = pair * lq + rows
    target = values + places[:, None] * HEAD_DIM + d[None, :]
    tl.store(target, round_to_grid(x, largest[:, None]), mask=inside)
    tl.store(unit + places, largest * (scale * 1.4426950408889634 / 127), mask=rows < lq)  # log2 e
    tl.store(shift + places, tl.sum(x * m[None, :], 1) * scale, mask=rows < lq)


@triton.jit
def quantise_keys(
    k,  # [B, H, Lk, D] fp16 or bf16; strides below, the last one is 1
    mean,  # [B, H, D] float32, contiguous
    values,  # [B, H, Lk, D] int8, contiguous
    unit,  # [B, H, Tk * ROWS] float32, contiguous
    means,  # [B, H, Tk, D] as k, contiguous: of the rows of each key tile, as they come
    order,  # [ordered] int64, contiguous: the key of each row of the map
    k_batch,
    k_head,
    k_row,
    heads,
    lk,
    ordered,  # Lk, or 0: keys as they come, order unused
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    ROWS: tl.constexpr,  # of a key tile
):
    """One program: one key tile of one head. Grid ``(Tk, B * H)``."""
    tile = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    rows = tile * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, PADDED_DIM)
    inside = (rows < lk)[:, None] & (d < HEAD_DIM)[None, :]
    k += pair // heads * k_batch + pair % heads * k_head
    listed = tokens_of(order, ordered, rows)
    x = tl.load(k + (listed * k_row)[:, None] + d[None, :], mask=inside, other=0.0)
    means += (pair * tl.num_programs(0) + tile) * HEAD_DIM
    store_mean(means, x, tl.minimum(lk - tile * ROWS, ROWS), d, HEAD_DIM)
    m = tl.load(mean + pair * HEAD_DIM + d, mask=d < HEAD_DIM, other=0.0)
    x = tl.where(inside, rotated(x, HEAD_DIM, PADDED_DIM) - m[None, :], 0.0)
    largest = largest_of(x, 1)
    target = values + (pair * lk + rows)[:, None] * HEAD_DIM + d[None, :]
    tl.store(target, round_to_grid(x, largest[:, None]), mask=inside)
    # Two bits less than a float32 has: see attend.py.
    step = ((largest * (1 / 127)).to(tl.int32, bitcast=True) & -4).to(tl.float32, bitcast=True)
    tl.store(unit + pair * tl.num_programs(0) * ROWS + rows, step)


@triton.jit
def store_mean(mean, x, rows, d, HEAD_DIM: tl.constexpr):
    """The mean of the first ``rows`` of a tile, the others of which are zero."""
    total = tl.sum(x.to(tl.float32), 0)
    tl.store(mean + d, (total / rows).to(mean.dtype.element_ty), mask=d < HEAD_DIM)


@triton.jit
def rotated(x, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr):
    """Rows of 16 bits times the Hadamard matrix: at i, j minus one where i and j have an odd number
    of bits in common, else one, over the root of their number. float32, exact products."""
    tl.static_assert(HEAD_DIM == PADDED_DIM)
    d = tl.arange(0, PADDED_DIM)
    common = d[:, None] & d[None, :]
    common ^= common >> 4
    common ^= common >> 2
    common ^= common >> 1
    sign = (1 - 2 * (common & 1)).to(tl.float32).to(x.dtype)
    return tl.dot(x, sign) * (HEAD_DIM**-0.5)


@triton.jit
def round_to_grid(x, largest):
    """-127 .. 127, to the nearest."""
    return tl.floor(x * (127 / largest) + 0.5).to(tl.int8)


@triton.jit
def largest_of(x, AXIS: tl.constexpr):
    """Largest magnitude along an axis, but at least 1e-12: a unit of 0 would make masked scores,
    minus infinity, no numbers. Not a number where any isn't, so that it shows in the end.

    (0 times the sum is 0, unless there is an infinity or no number in it.)
    """
    return tl.maximum(tl.max(tl.abs(x), AXIS), 1e-12) + 0 * tl.sum(x, AXIS)
