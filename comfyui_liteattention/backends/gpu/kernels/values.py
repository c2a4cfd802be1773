"""Values in fp16 or e4m3, before the attention kernel multiplies them (``VALUES`` there).

``peak_values`` finds the largest magnitude of each channel, ``scale_values`` divides by a unit of
the channel:

    fp16    a power of two, so that the largest lies in [2^(TOP - 1), 2^TOP): nothing is rounded,
            but for what lies 2^(TOP + 24) and more below the largest
    e4m3    so that the largest becomes LARGEST; written channel by channel, with zeros up to a
            whole key tile, as the matrix instruction wants to read them

Both read the values in the order of the tile map and leave the mean of each key tile, which stands
in for the tile where it is skipped.

Rounded each to the nearest e4m3, the values of a channel in one tile have errors that don't cancel,
and keys that are attended to about alike pass their sum on. So all are shifted by the mean error
and rounded anew, which changes the few that were nearly halfway; the tile keeps what of the two has
the smaller sum of errors.

``scaled_values.py`` beside this folder has the same in plain PyTorch. **No GPU has run this yet.**
"""

# ruff: noqa: N803 - compile-time arguments are capitals, as is the custom in Triton

from __future__ import annotations

import triton
import triton.language as tl

from .attend import tokens_of
from .quantise import store_mean

#: Steps of 1 in which errors are added up: whole numbers, whose sum is the same in any order.
ERROR_STEPS = tl.constexpr(2.0**20)


@triton.jit
def peak_values(
    v,  # [B, H, Lk, D] fp16 or bf16; strides below, the last one is 1
    peak,  # [B, H, D] int32, contiguous, 0 before: the bits of a float32
    v_batch,
    v_head,
    v_row,
    heads,
    lk,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program: some rows of one head. Grid ``(ceil(Lk / ROWS), B * H)``."""
    pair = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, PADDED_DIM)
    v += pair // heads * v_batch + pair % heads * v_head
    inside = (rows < lk)[:, None] & (d < HEAD_DIM)[None, :]
    x = tl.load(v + (rows.to(tl.int64) * v_row)[:, None] + d[None, :], mask=inside, other=0.0)
    # Magnitudes compare as their bits do, and what is not a number is the largest of all.
    bits = tl.abs(x.to(tl.float32)).to(tl.int32, bitcast=True)
    tl.atomic_max(peak + pair * HEAD_DIM + d, tl.max(bits, 0), mask=d < HEAD_DIM, sem="relaxed")


@triton.jit
def scale_values(
    v,  # as above
    peak,  # as above
    values,  # [B, H, Lk, D] fp16 or [B, H, D, Tk * ROWS] e4m3, contiguous
    unit,  # [B, H, D] float32, contiguous
    means,  # [B, H, Tk, D] as v, contiguous: of the rows of each key tile
    order,  # [ordered] int64, contiguous: the value of each row of the map
    v_batch,
    v_head,
    v_row,
    heads,
    lk,
    ordered,  # Lk, or 0: values as they come, order unused
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    ROWS: tl.constexpr,  # of a key tile
    E4M3: tl.constexpr,
    TOP: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """One program: one key tile of one head. Grid ``(Tk, B * H)``."""
    tile = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    rows = tile * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, PADDED_DIM)
    v += pair // heads * v_batch + pair % heads * v_head
    inside = (rows < lk)[:, None] & (d < HEAD_DIM)[None, :]
    listed = tokens_of(order, ordered, rows)
    x = tl.load(v + (listed * v_row)[:, None] + d[None, :], mask=inside, other=0.0)
    means += (pair * tl.num_programs(0) + tile) * HEAD_DIM
    store_mean(means, x, tl.minimum(lk - tile * ROWS, ROWS), d, HEAD_DIM)
    bits = tl.load(peak + pair * HEAD_DIM + d, mask=d < HEAD_DIM, other=0)
    if E4M3:
        largest = bits.to(tl.float32, bitcast=True)
        # Not maximum: what is not a number has to stay it.
        largest = tl.where(largest < 1e-36, 1e-36, largest)
        channel = largest * (1 / LARGEST)
        scaled = x.to(tl.float32) * (LARGEST / largest)[None, :]
        nearest = to_e4m3(scaled)
        off = summed_error(nearest, scaled)
        shifted = scaled - (off * (1.0 / ERROR_STEPS / ROWS))[None, :]
        shifted = tl.minimum(tl.maximum(shifted, -LARGEST), LARGEST)
        shifted = to_e4m3(tl.where(inside, shifted, 0.0))
        better = tl.abs(summed_error(shifted, scaled)) < tl.abs(off)
        balanced = tl.where(better[None, :], shifted, nearest)
        length = tl.num_programs(0) * ROWS
        target = values + pair * length * HEAD_DIM
        target += d[:, None].to(tl.int64) * length + rows[None, :]
        tl.store(target, tl.trans(balanced).to(tl.float8e4nv), mask=(d < HEAD_DIM)[:, None])
    else:
        # The exponent that the unit gets, within what a float32 and its inverse can have.
        exponent = tl.minimum(tl.maximum((bits >> 23) + (1 - TOP), 1), 253)
        channel = (exponent << 23).to(tl.float32, bitcast=True)
        inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
        target = values + (pair * lk + rows)[:, None] * HEAD_DIM + d[None, :]
        tl.store(target, (x.to(tl.float32) * inverse[None, :]).to(tl.float16), mask=inside)
    if tile == 0:
        tl.store(unit + pair * HEAD_DIM + d, channel, mask=d < HEAD_DIM)


@triton.jit
def to_e4m3(x):
    """The nearest number of e4m3, as float32."""
    return x.to(tl.float8e4nv).to(tl.float32)


@triton.jit
def summed_error(rounded, exact):
    """Of each channel, in steps."""
    return tl.sum(tl.floor((rounded - exact) * ERROR_STEPS + 0.5), 0)
