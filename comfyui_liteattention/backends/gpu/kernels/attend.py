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
``q_unit_r k_unit_j (q_r . k_j)`` up to a constant of the row, which only the LSE sees.

``VALUES`` says how p v is multiplied. 0: in the dtype of v, summed in float32. 1 and 2: in fp16 or
e4m3, summed in fp16 over the keys of one tile and in float32 beyond, which RTX cards do two and
four times as fast. v then comes scaled by channel (``kernels/values.py``), and p is scaled up by
``2^LIFT``, which the quotient o / l doesn't see and the LSE gets back, such that no sum overflows.
fp16: 64 keys times 2^LIFT times the largest v is half of what fp16 holds, and rounding doubles no p
while scores are below 2^23 log2 units; what overflows beyond that is infinite, and an infinite
result is never passed on. e4m3: p ends at 448, and so do sums in time.

The first ``audited`` programs of a head do some query tiles once more over all tiles, for the audit
of a sparse call (``LISTS`` only): in the same launch they fill gaps instead of a wave of their own.

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
    v,  # [B, H, Lk, D], as out or fp16; e4m3: [B, H, D, Lk] with Lk a multiple of BN, zeros behind
    out,  # [B, H, Lq, D] fp16 or bf16
    lse,  # [B, H, Lq] float32, contiguous, natural log
    score,  # [B, H, Tq, Tk] float32, contiguous; written for visited tiles only
    count,  # [B, H, Tq] int32, contiguous
    index,  # [B, H, Tq, Tk] int32, contiguous
    q_unit,  # [B, H, Lq] float32, contiguous: one step of q in log2, scale included; INT8 only
    k_unit,  # [B, H, Tk * BN] float32, contiguous: one step of k; INT8 only
    shift,  # [B, H, Lq] float32, contiguous: what to add to lse; INT8 only
    v_unit,  # [B, H, D] float32, contiguous: what v was divided by; unused with VALUES 0
    full_out,  # [B, H, queries, D], contiguous, as out: the audited queries in the map's order
    full_lse,  # [B, H, queries] float32, contiguous
    every,  # [Tk] int32: 0, 1, 2, ...; only looked at by an audit, as the two above
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
    v_row,  # of e4m3 the stride of a channel
    out_batch,
    out_head,
    out_row,
    heads,
    lq,
    lk,
    tk,
    ordered,  # Lq, or 0: queries as they come, order unused
    first_audited,  # query tile
    audited,  # query tiles, 0 without an audit
    queries,  # in them
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,  # the next power of two
    BM: tl.constexpr,
    BN: tl.constexpr,
    LISTS: tl.constexpr,  # False: visit every tile in ascending order, count and index unused
    CRITERION: tl.constexpr,  # place in kernel_table.CRITERIA: 0 none, 1 mass, 2 gap
    INT8: tl.constexpr,
    VALUES: tl.constexpr,  # place in kernel_table.VALUES: 0 as v is, 1 fp16, 2 e4m3
    LIFT: tl.constexpr,  # log2 of the largest p
):
    """One program: one query tile of one head. Grid ``(audited + Tq, B * H)``."""
    query_tile = tl.program_id(0)
    pair = tl.program_id(1)
    batch, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    if LISTS:
        query_tile = map_row(query_tile, audited, first_audited)
    row = pair.to(tl.int64) * (tl.num_programs(0) - audited) + query_tile

    m = tl.arange(0, BM)
    n = tl.arange(0, BN)
    d = tl.arange(0, PADDED_DIM)
    # Rows past the end repeat the last one: always in bounds, and no maximum over rows sees them.
    # So do keys, which are masked only in the scores. That costs fewer registers than masked loads.
    rows = tokens_of(order, ordered, tl.minimum(query_tile * BM + m, lq - 1))
    q += batch * q_batch + head * q_head
    q_tile = load_tile(q, (rows * q_row)[:, None], d[None, :], HEAD_DIM, PADDED_DIM)
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head

    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, PADDED_DIM], tl.float32)

    if INT8:
        row_unit = tl.load(q_unit + pair.to(tl.int64) * lq + rows)
        k_unit += pair.to(tl.int64) * tk * BN
    tile, visits = 0, tk
    if LISTS:
        if tl.program_id(0) < audited:
            index = every
        else:
            index += row * tk
            visits = tl.load(count + row)
        tile = tl.load(index)
    for j in range(visits):
        # Read one tile ahead, so that no key load waits for its own index.
        following = j + 1
        if LISTS:
            following = tl.load(index + tl.minimum(j + 1, tk - 1))
        first = tile * BN
        keys = tl.minimum(n, lk - 1 - first)
        k_first = k + first.to(tl.int64) * k_row
        k_tile = load_tile(k_first, (keys * k_row)[None, :], d[:, None], HEAD_DIM, PADDED_DIM)
        if VALUES == 2:
            v_tile = tl.load(v + first + n[:, None] + (d * v_row)[None, :])
        else:
            v_first = v + first.to(tl.int64) * v_row
            v_tile = load_tile(v_first, (keys * v_row)[:, None], d[None, :], HEAD_DIM, PADDED_DIM)

        if INT8:
            # 1.5 * 2^23, as bits and as a number: integers below 2^22 added to the former are those
            # added to the latter, which spares the conversion. Sums stay below 127^2 * 128 < 2^21.
            # Taking the number off, a key's unit and the mask are then one multiply-add, exact but
            # for its result: units have 22 bits, so three times one fits a float32.
            s = tl.full([BM, BN], 0x4B400000, tl.int32)
            s = tl.dot(q_tile, k_tile, s, out_dtype=tl.int32).to(tl.float32, bitcast=True)
            key_unit = tl.load(k_unit + first + n)
            origin = tl.where(n < lk - first, -12582912.0 * key_unit, float("-inf"))
            s = tl.fma(s, key_unit[None, :], origin[None, :])
            unit = row_unit
        else:
            s = tl.dot(q_tile, k_tile)
            unit = tl.full([BM], 1.0, tl.float32) * scale_log2
            s = tl.where((n < lk - first)[None, :], s, float("-inf"))
        tile_top = tl.max(s, 1) * unit
        new_top = tl.maximum(top, tile_top)
        p = tl.exp2(s * unit[:, None] - (new_top - LIFT)[:, None])
        decay = tl.exp2(top - new_top)
        weight = tl.sum(p, 1)
        total = total * decay + weight
        if VALUES == 0:
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * decay[:, None])
        else:
            part = tl.dot(p.to(v_tile.dtype), v_tile, out_dtype=tl.float16)
            acc = acc * decay[:, None] + part

        if CRITERION == 1:
            # weight / total in fewer instructions, which may round to more than 1.
            root = tl.rsqrt(total)
            largest = tl.max(weight * root * root, 0)
            largest = tl.minimum(largest, 1.0, propagate_nan=tl.PropagateNan.ALL)
            tl.store(score + row * tk + tile, largest, mask=tl.program_id(0) >= audited)
        if CRITERION == 2:
            gap = tl.max(tile_top - new_top, 0)
            tl.store(score + row * tk + tile, gap, mask=tl.program_id(0) >= audited)
        top = new_top
        tile = following

    # An empty list leaves total = 0: zeros out, lse = -inf, as for an empty softmax.
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    # The rows once more. As visits is never below 0 they are the same, which the compiler can't
    # know: it would keep them in registers through the loop.
    program = tl.program_id(0) + tl.minimum(visits, 0)
    query_tile = program
    if LISTS:
        query_tile = map_row(program, audited, first_audited)
    rows = tokens_of(order, ordered, tl.minimum(query_tile * BM + m, lq - 1))
    inside = query_tile * BM + m < lq
    natural = (top + tl.log2(total) - LIFT) * 0.6931471805599453  # ln 2
    if INT8:
        natural += tl.load(shift + pair.to(tl.int64) * lq + rows)
    if VALUES != 0:
        channels = tl.load(v_unit + pair.to(tl.int64) * HEAD_DIM + d, mask=d < HEAD_DIM, other=0.0)
        acc *= channels[None, :]
    if LISTS:
        if program < audited:
            rows = (program * BM + m).to(tl.int64)
            out = full_out + pair.to(tl.int64) * queries * HEAD_DIM
            out_row = HEAD_DIM
            lse = full_lse + pair.to(tl.int64) * queries
        else:
            out += batch * out_batch + head * out_head
            lse += pair.to(tl.int64) * lq
    else:
        out += batch * out_batch + head * out_head
        lse += pair.to(tl.int64) * lq
    target = out + (rows * out_row)[:, None] + d[None, :]
    tl.store(target, acc.to(out.dtype.element_ty), mask=inside[:, None] & (d < HEAD_DIM)[None, :])
    tl.store(lse + rows, natural, mask=inside)


@triton.jit
def map_row(program, audited, first_audited):
    """The query tile that a program works on: the audited ones first, then every one."""
    return tl.where(program < audited, first_audited + program, program - audited)


@triton.jit
def tokens_of(order, ordered, rows):
    """The tokens, int64, that rows of the map stand for."""
    rows = rows.to(tl.int64)
    return tl.load(order + rows, mask=rows < ordered, other=rows)


@triton.jit
def load_tile(base, rows, columns, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr):
    """A tile at ``base + rows + columns``, zero in the columns from HEAD_DIM on."""
    if HEAD_DIM == PADDED_DIM:
        return tl.load(base + (rows + columns))
    else:
        return tl.load(base + (rows + columns), mask=columns < HEAD_DIM, other=0.0)
