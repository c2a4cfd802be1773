"""What skipped tiles contribute as means; the twins are in ``pooled.py``.

One program does one query tile of one head: an online softmax over the mean keys of the tiles that
the map says were skipped, with output ``t`` and LSE ``M``. ``add_skipped`` adds it to the result,
``out += g (t - out)`` with ``g = sigmoid(M - lse + ln factor)``; ``audit_skipped`` compares it with
what is missing in audited rows.

Runs in the Triton interpreter (tests/kernels) and compiles for every architecture of
``kernel_table.py``; **no GPU has run it yet**.
"""

# ruff: noqa: N803 - compile-time arguments are capitals, as is the custom in Triton

from __future__ import annotations

import triton
import triton.language as tl

from ...pooled import LARGEST_LOG_SHARE
from .attend import load_tile, tokens_of

LARGEST = tl.constexpr(LARGEST_LOG_SHARE * 1.4426950408889634)  # log2(e)


@triton.jit
def add_skipped(
    q,  # [B, H, Lq, D] fp16 or bf16, as keys, values and out; strides below, the last one is 1
    keys,  # [B, H, Tk, D] contiguous, means over the key tiles
    values,  # [B, H, Tk, D] contiguous
    out,  # [B, H, Lq, D], changed in place
    lse,  # [B, H, Lq] float32, contiguous, natural log
    live,  # [B, H, Tq, words] int32, contiguous
    factor,  # [B, H] float32, contiguous
    order,  # [ordered] int64, contiguous: the query of each row of the map
    scale_log2,  # scale * log2(e), positive
    q_batch,
    q_head,
    q_row,
    out_batch,
    out_head,
    out_row,
    heads,
    lq,
    lk,
    tk,
    words,
    ordered,  # Lq, or 0: queries as they come, order unused
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,  # the next power of two
    BM: tl.constexpr,
    BN: tl.constexpr,  # keys per tile
    MEANS: tl.constexpr,  # tiles at once
):
    """Grid ``(Tq, B * H)``."""
    query_tile = tl.program_id(0)
    pair = tl.program_id(1)
    batch, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    m = tl.arange(0, BM)
    d = tl.arange(0, PADDED_DIM)
    # Rows past the end repeat the last one.
    rows = tokens_of(order, ordered, tl.minimum(query_tile * BM + m, lq - 1))
    q += batch * q_batch + head * q_head
    q_tile = load_tile(q, (rows * q_row)[:, None], d[None, :], HEAD_DIM, PADDED_DIM)
    keys += pair.to(tl.int64) * tk * HEAD_DIM
    values += pair.to(tl.int64) * tk * HEAD_DIM
    live += (pair.to(tl.int64) * tl.num_programs(0) + query_tile) * words

    part, part_lse = attend_means(
        q_tile, keys, values, live, lk, tk, scale_log2, d, HEAD_DIM, PADDED_DIM, BM, BN, MEANS
    )
    kept = tl.load(lse + pair.to(tl.int64) * lq + rows) * 1.4426950408889634  # log2(e)
    # Nothing skipped, or a factor of 0: an infinite exponent, and so a weight of 0.
    weight = 1.0 / (1.0 + tl.exp2(kept - part_lse - tl.log2(tl.load(factor + pair))))

    out += batch * out_batch + head * out_head
    target = out + (rows * out_row)[:, None] + d[None, :]
    written = (query_tile * BM + m < lq)[:, None] & (d < HEAD_DIM)[None, :] & (weight > 0)[:, None]
    old = tl.load(target, mask=written, other=0.0).to(tl.float32)
    new = old + weight[:, None] * (part - old)
    tl.store(target, new.to(out.dtype.element_ty), mask=written)


@triton.jit
def audit_skipped(
    q,  # as above
    keys,
    values,
    out,
    lse,
    full_out,  # [B, H, queries, D]: the audited queries over all tiles, in the order of the map
    full_lse,  # [B, H, queries] float32, contiguous, natural log
    live,
    order,
    sums,  # [B, H, T, 2] float32, contiguous: see pooled.Agreement
    scale_log2,
    q_batch,
    q_head,
    q_row,
    out_batch,
    out_head,
    out_row,
    full_batch,
    full_head,
    full_row,
    heads,
    lq,
    lk,
    tk,
    words,
    ordered,
    first_tile,  # of the audited query tiles
    tq,
    queries,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    MEANS: tl.constexpr,
):
    """Grid ``(T, B * H)``, T audited query tiles."""
    place = tl.program_id(0)
    query_tile = first_tile + place
    pair = tl.program_id(1)
    batch, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    m = tl.arange(0, BM)
    d = tl.arange(0, PADDED_DIM)
    rows = tokens_of(order, ordered, tl.minimum(query_tile * BM + m, lq - 1))
    q += batch * q_batch + head * q_head
    q_tile = load_tile(q, (rows * q_row)[:, None], d[None, :], HEAD_DIM, PADDED_DIM)
    keys += pair.to(tl.int64) * tk * HEAD_DIM
    values += pair.to(tl.int64) * tk * HEAD_DIM
    live += (pair.to(tl.int64) * tq + query_tile) * words
    part, part_lse = attend_means(
        q_tile, keys, values, live, lk, tk, scale_log2, d, HEAD_DIM, PADDED_DIM, BM, BN, MEANS
    )

    out += batch * out_batch + head * out_head
    kept = load_tile(out, (rows * out_row)[:, None], d[None, :], HEAD_DIM, PADDED_DIM)
    kept = kept.to(tl.float32)
    kept_lse = tl.load(lse + pair.to(tl.int64) * lq + rows) * 1.4426950408889634  # log2(e)
    audited = tl.minimum(place * BM + m, queries - 1).to(tl.int64)
    full_out += batch * full_batch + head * full_head
    full = load_tile(full_out, (audited * full_row)[:, None], d[None, :], HEAD_DIM, PADDED_DIM)
    all_lse = tl.load(full_lse + pair.to(tl.int64) * queries + audited) * 1.4426950408889634

    share = tl.exp2(tl.minimum(part_lse - kept_lse, LARGEST))
    growth = tl.exp2(tl.minimum(tl.maximum(all_lse - kept_lse, 0.0), LARGEST))
    added = share[:, None] * (part - kept)
    missing = growth[:, None] * (full.to(tl.float32) - kept)
    inside = (query_tile * BM + m < lq)[:, None]
    added = tl.where(inside, added, 0.0)
    sums += (pair.to(tl.int64) * tl.num_programs(0) + place) * 2
    tl.store(sums, tl.sum(tl.sum(added * missing, 1), 0))
    tl.store(sums + 1, tl.sum(tl.sum(added * added, 1), 0))


@triton.jit
def attend_means(
    q_tile,
    keys,
    values,
    live,
    lk,
    tk,
    scale_log2,
    d,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    MEANS: tl.constexpr,
):
    """Attention to the means of the tiles that are not in ``live``: output and LSE (log2), 0 and
    minus infinity where there are none."""
    n = tl.arange(0, MEANS)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, PADDED_DIM], tl.float32)
    for first in range(0, tk, MEANS):
        tiles = first + n
        inside = tl.minimum(tiles, tk - 1)
        bits = tl.load(live + inside // 32) >> (inside % 32)
        skipped = ((bits & 1) == 0) & (tiles < tk)
        means = inside * HEAD_DIM
        k_tile = load_tile(keys, means[None, :], d[:, None], HEAD_DIM, PADDED_DIM)
        v_tile = load_tile(values, means[:, None], d[None, :], HEAD_DIM, PADDED_DIM)

        count = tl.minimum(lk - inside * BN, BN).to(tl.float32)
        s = tl.dot(q_tile, k_tile) * scale_log2 + tl.log2(count)[None, :]
        s = tl.where(skipped[None, :], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        # A row that has seen nothing skipped yet has no maximum to subtract.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(s - base[:, None])
        decay = tl.exp2(top - base)
        total = total * decay + tl.sum(p, 1)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * decay[:, None])
        top = new_top

    return acc / tl.where(total > 0, total, 1.0)[:, None], top + tl.log2(total)
