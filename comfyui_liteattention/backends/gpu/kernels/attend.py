"""The attention kernel: one Triton source for every card, prebuilt or compiled on the spot.

Forward attention over the key tiles that a list names (LiteAttention, arXiv 2511.11062), with the
online softmax of FlashAttention-2 (arXiv 2307.08691, Algorithm 1). With ``s_rj = c * q_r . k_j``,
``c = scale * log2(e)``, row ``r`` of a query tile visits key tiles ``t = 1, 2, ...`` in list order:

    m_t = max(m_{t-1}, max_j s_rj)                 running maximum, log2
    p_j = 2^(s_rj - m_t),   w_t = sum_j p_j        this tile's share of the softmax sum
    l_t = 2^(m_{t-1} - m_t) l_{t-1} + w_t          running sum
    o_t = 2^(m_{t-1} - m_t) o_{t-1} + p . v        at the end: out = o / l, lse = ln 2 (m + log2 l)

and the tile's score is, over the rows below Lq,

    gap:   max_r (max_j s_rj - m_t)    log2        Eq. 7 of the paper
    mass:  max_r (w_t / l_t)           linear      its log2 is taken outside

**Deviation from ``base.Attended``:** the reference there is the row's *final* maximum and sum; here
it is the running one, this tile included, because the final one isn't known yet. As ``m_t`` and
``l_t 2^m_t`` only grow, a score is never below the final one: a tile that is negligible here is
negligible there, not the other way round, and the first visited tile always scores 0. How much is
missed is a matter of the visiting order, which the lists decide: strong tiles first, or alternately
ascending and descending. The final reference would need a second pass over q k^T, or the previous
call's LSE of every row and layer kept in memory.

With ``INT8``, q and k come quantised (``kernels/quantise.py``): ``c q_r . k_j`` is then
``q_unit_r k_unit_t (q_r . k_j)`` up to a constant of the row, which only the LSE sees.

Runs in the Triton interpreter (tests/kernels) and compiles for every architecture of
``kernel_table.py``; **no GPU has run it yet**.
"""

# ruff: noqa: N803 - compile-time arguments are capitals, as is the custom in Triton

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def attend_tiles(
    q,  # [B, H, Lq, D], dtype of out or int8; strides below, the last one is 1
    k,  # [B, H, Lk, D], as q
    v,  # [B, H, Lk, D], as out
    out,  # [B, H, Lq, D] fp16 or bf16
    lse,  # [B, H, Lq] float32, contiguous, natural log
    score,  # [B, H, Tq, Tk] float32, contiguous; written for visited tiles only
    count,  # [B, H, Tq] int32, contiguous
    index,  # [B, H, Tq, Tk] int32, contiguous
    q_unit,  # [B, H, Lq] float32, contiguous: one step of q in log2, scale included; INT8 only
    k_unit,  # [B, H, Tk] float32, contiguous: one step of k; INT8 only
    shift,  # [B, H, Lq] float32, contiguous: what to add to lse; INT8 only
    order,  # [ordered] int64, contiguous: the query of each row of the map
    scale_log2,  # scale * log2(e), positive; unused with INT8
    q_batch,  # strides in elements, multiples of 8: 64 bits for batch and head,
    q_head,
    q_row,  # 32 bits for rows, so that offsets within a tile need one register
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    out_batch,
    out_head,
    out_row,
    heads,
    lq,
    lk,
    tk,
    ordered,  # Lq, or 0: queries as they come, order unused
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,  # the next power of two
    BM: tl.constexpr,
    BN: tl.constexpr,
    LISTS: tl.constexpr,  # False: visit every tile in ascending order, count and index unused
    CRITERION: tl.constexpr,  # place in kernel_table.CRITERIA: 0 none, 1 mass, 2 gap
    INT8: tl.constexpr,
):
    """One program: one query tile of one head. Grid ``(Tq, B * H)``."""
    query_tile = tl.program_id(0)
    pair = tl.program_id(1)
    batch, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    row = pair.to(tl.int64) * tl.num_programs(0) + query_tile

    m = tl.arange(0, BM)
    n = tl.arange(0, BN)
    d = tl.arange(0, PADDED_DIM)
    # Rows past the end repeat the last one: always in bounds, and no maximum over rows sees them.
    # So do keys, which are masked only in the scores. That costs fewer registers than masked loads.
    rows = queries_of(order, ordered, tl.minimum(query_tile * BM + m, lq - 1))
    q += batch * q_batch + head * q_head
    q_tile = load_tile(q, (rows * q_row)[:, None], d[None, :], HEAD_DIM, PADDED_DIM)
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head

    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, PADDED_DIM], tl.float32)

    if INT8:
        row_unit = tl.load(q_unit + pair.to(tl.int64) * lq + rows)
        k_unit += pair.to(tl.int64) * tk
    tile, visits = 0, tk
    if LISTS:
        index += row * tk
        tile = tl.load(index)
        visits = tl.load(count + row)
    for j in range(visits):
        # Read one tile ahead, so that no key load waits for its own index.
        following = j + 1
        if LISTS:
            following = tl.load(index + tl.minimum(j + 1, tk - 1))
        first = tile * BN
        keys = tl.minimum(n, lk - 1 - first)
        k_first = k + first.to(tl.int64) * k_row
        v_first = v + first.to(tl.int64) * v_row
        k_tile = load_tile(k_first, (keys * k_row)[None, :], d[:, None], HEAD_DIM, PADDED_DIM)
        v_tile = load_tile(v_first, (keys * v_row)[:, None], d[None, :], HEAD_DIM, PADDED_DIM)

        if INT8:
            # 1.5 * 2^23, as bits and as a number: integers below 2^22 added to the former are those
            # added to the latter, which spares the conversion. Sums stay below 127^2 * 128 < 2^21.
            s = tl.dot(q_tile, k_tile, tl.full([BM, BN], 0x4B400000, tl.int32))
            s = s.to(tl.float32, bitcast=True) - 12582912.0
            unit = row_unit * tl.load(k_unit + tile)
        else:
            s = tl.dot(q_tile, k_tile)
            unit = tl.full([BM], 1.0, tl.float32) * scale_log2
        s = tl.where((n < lk - first)[None, :], s, float("-inf"))
        tile_top = tl.max(s, 1) * unit
        new_top = tl.maximum(top, tile_top)
        p = tl.exp2(s * unit[:, None] - new_top[:, None])
        decay = tl.exp2(top - new_top)
        weight = tl.sum(p, 1)
        total = total * decay + weight
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * decay[:, None])

        if CRITERION == 1:
            # weight / total in fewer instructions, which may round to more than 1.
            root = tl.rsqrt(total)
            largest = tl.max(weight * root * root, 0)
            largest = tl.minimum(largest, 1.0, propagate_nan=tl.PropagateNan.ALL)
            tl.store(score + row * tk + tile, largest)
        if CRITERION == 2:
            tl.store(score + row * tk + tile, tl.max(tile_top - new_top, 0))
        top = new_top
        tile = following

    # An empty list leaves total = 0: zeros out, lse = -inf, as for an empty softmax.
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    # The rows once more. As visits is never below 0 they are the same, which the compiler can't
    # know: it would keep them in registers through the loop.
    again = query_tile + tl.minimum(visits, 0)
    rows = queries_of(order, ordered, tl.minimum(again * BM + m, lq - 1))
    inside = again * BM + m < lq
    out += batch * out_batch + head * out_head
    target = out + (rows * out_row)[:, None] + d[None, :]
    tl.store(target, acc.to(out.dtype.element_ty), mask=inside[:, None] & (d < HEAD_DIM)[None, :])
    natural = (top + tl.log2(total)) * 0.6931471805599453  # ln 2
    places = pair.to(tl.int64) * lq + rows
    if INT8:
        natural += tl.load(shift + places)
    tl.store(lse + places, natural, mask=inside)


@triton.jit
def queries_of(order, ordered, rows):
    """The queries, int64, that rows of the map stand for."""
    rows = rows.to(tl.int64)
    return tl.load(order + rows, mask=rows < ordered, other=rows)


@triton.jit
def load_tile(base, rows, columns, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr):
    """A tile at ``base + rows + columns``, zero in the columns from HEAD_DIM on."""
    if HEAD_DIM == PADDED_DIM:
        return tl.load(base + (rows + columns))
    else:
        return tl.load(base + (rows + columns), mask=columns < HEAD_DIM, other=0.0)
