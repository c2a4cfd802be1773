"""The compiled half of the CPU backend. Imports numba, so it is itself imported lazily.

All functions see one head. ``T = 64`` rows make a tile and ``W = 16`` floats a lane group, the
width of one vector of the matrix kernel. Workspaces are float32 and laid out for that kernel:

* queries  ``[T/W, D, W]``: one query tile, transposed, so that a vector holds W rows;
* keys     ``[Tk, T, D]``: the last key again behind ``Lk``, which changes no maximum; inside a tile
  in panels of BLOCK keys, each transposed, so that the matrix kernel reads straight on;
* values   ``[Tk, Dp/W, T, W]`` with ``Dp`` = :func:`padded` D: zeros behind ``Lk`` and D;
* scores   ``[T keys, T rows]``: transposed too, so that the softmax of W rows needs no reduction
  inside a vector.

Everything compiled stays in this one file: numba's cache looks only at the file of the caller.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import config, njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]
Longs = NDArray[np.int64]
Raw = NDArray[Any]  # float32, or 16-bit floats as their bits: see _widen

TILE = 64
LANES = 16
GROUPS = TILE // LANES
# Rows of sums that the registers hold, and lane groups of each. AVX2 has 16 registers of 8 lanes:
# 12 sums, 2 vectors of B, a broadcast of A. AVX-512 has 32 of 16 lanes: 24 sums, and so few reads
# for each product that both its multipliers are kept busy. Where numba is told for which CPU to
# compile, its cache may be another CPU's, and what this one can do must not decide.
TOLD = getattr(config, "CPU_NAME", None) or getattr(config, "CPU_FEATURES", None)
WIDE = binding.get_host_cpu_features().get("avx512f") and not TOLD
BLOCK, AT_ONCE = (12, 2) if WIDE else (6, 1)
BLOCK_END = TILE // BLOCK * BLOCK
BLOCK_REST = TILE - BLOCK_END
UNROLL = 4

MASS = 1
GAP = 2

ZERO = np.float32(0)
ONE = np.float32(1)
MINUS_INF = np.float32(-np.inf)
LN2 = math.log(2)
# Below this a share underflows in float32. A visited tile never reports -inf.
LOWEST = np.float32(-126)


def compiled(function: Callable[..., Any]) -> Any:
    """``njit`` that releases the GIL and keeps its code on disk where a folder can be written.

    Only under the name that ``backend.py`` gives this module: the cache remembers it.
    """
    options: dict[str, Any] = {"nogil": True, "fastmath": {"contract"}, "error_model": "numpy"}
    try:
        return njit(cache=__name__ == "_liteattention_cpu_kernels", **options)(function)
    except RuntimeError:  # no cache folder can be written
        return njit(**options)(function)


def padded(head_dim: int) -> int:
    """D rounded up to as many lane groups as are worked on at once."""
    return -(-head_dim // (AT_ONCE * LANES)) * AT_ONCE * LANES


def in_llvm(function: Callable[..., Any]) -> Any:
    """An ``intrinsic``: a function that writes LLVM code for the types (and constants) it gets."""
    return intrinsic(prefer_literal=True)(function)


# --- the matrix kernel ----------------------------------------------------------------------------

_F32 = ir.FloatType()
_I32 = ir.IntType(32)
_VECTOR = ir.VectorType(_F32, LANES)


@in_llvm
def _multiply(
    typing, c, c_at, c_row, a, a_at, a_row, a_step, b, b_at, b_group, depth, rows, groups, top
):
    """``A [rows, depth] @ B [depth, groups * W]``, all sums held in registers.

    With ``top`` None the product is added to ``C [rows, groups * W]``; otherwise it becomes C and
    raises ``top [groups * W]`` to the maxima of its columns. A, B, C are float32 arrays with the
    offset of their first element; ``c_row``, ``a_row``, ``a_step`` are strides in elements; each
    lane group of B is dense, ``b_group`` elements from one to the next. ``rows`` and ``groups`` are
    constants, ``depth`` a multiple of 4. Written as LLVM vectors because loops of scalars don't
    reliably end up as register blocks; LLVM fits the vectors to the CPU at hand.
    """
    n_rows, n_groups = rows.literal_value, groups.literal_value
    adds = isinstance(top, types.NoneType)
    size = types.intp
    signature = types.void(
        *(c, size, size, a, size, size, size, b, size, size, size), rows, groups, top
    )

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        def pointer(array: int) -> Any:
            return cgutils.create_struct_proxy(sig.args[array])(context, builder, args[array]).data

        def at(base: Any, index: Any) -> Any:
            return builder.gep(base, [index])

        def vector_at(base: Any, index: Any) -> Any:
            return builder.bitcast(at(base, index), _VECTOR.as_pointer())

        def constant(value: int) -> Any:
            return ir.Constant(index_type, value)

        c_row, a_row, a_step, b_group, depth = args[2], args[5], args[6], args[9], args[10]
        index_type = depth.type
        c_ptr, a_ptr, b_ptr = (at(pointer(i), args[i + 1]) for i in (0, 3, 7))
        nothing = ir.Constant(_VECTOR, ir.Undefined)
        first = ir.Constant(ir.VectorType(_I32, LANES), None)
        fma = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(_VECTOR, [_VECTOR] * 3), f"llvm.fmuladd.v{LANES}f32"
        )
        each = [(r, g) for r in range(n_rows) for g in range(n_groups)]
        targets, sums = {}, {}
        for r, g in each:
            there = builder.add(builder.mul(c_row, constant(r)), constant(g * LANES))
            targets[r, g] = vector_at(c_ptr, there)
            sums[r, g] = cgutils.alloca_once(builder, _VECTOR)  # becomes a register
            start = builder.load(targets[r, g], align=4) if adds else ir.Constant(_VECTOR, None)
            builder.store(start, sums[r, g])
        b_ptrs = [at(b_ptr, builder.mul(b_group, constant(g))) for g in range(n_groups)]
        with cgutils.for_range(builder, builder.udiv(depth, constant(UNROLL))) as loop:
            for u in range(UNROLL):
                step = builder.add(builder.mul(loop.index, constant(UNROLL)), constant(u))
                b_at = builder.mul(step, constant(LANES))
                b_vectors = [builder.load(vector_at(ptr, b_at), align=4) for ptr in b_ptrs]
                a_column = at(a_ptr, builder.mul(step, a_step))
                for r in range(n_rows):
                    scalar = builder.load(at(a_column, builder.mul(a_row, constant(r))))
                    lane = builder.insert_element(nothing, scalar, ir.Constant(_I32, 0))
                    spread = builder.shuffle_vector(lane, nothing, first)
                    for g, b_vector in enumerate(b_vectors):
                        product = builder.call(fma, [spread, b_vector, builder.load(sums[r, g])])
                        builder.store(product, sums[r, g])
        for place in each:
            builder.store(builder.load(sums[place]), targets[place], align=4)
        for g in range(0 if adds else n_groups):
            highest = vector_at(pointer(13), constant(g * LANES))
            for r in range(n_rows):
                x, y = builder.load(sums[r, g]), builder.load(highest, align=4)
                larger = builder.select(builder.fcmp_ordered(">", x, y), x, y)
                builder.store(larger, highest, align=4)
        return context.get_dummy_value()

    return signature, generate


# --- number formats -------------------------------------------------------------------------------


@in_llvm
def _float_of_bits(typing, bits):
    """int32 -> the float32 with these bits."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        return builder.bitcast(args[0], _F32)

    return types.float32(types.int32), generate


@in_llvm
def _bits_of_float(typing, value):
    """float32 -> its bits, int32."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        return builder.bitcast(args[0], _I32)

    return types.int32(types.float32), generate


@in_llvm
def _widen(typing, value):
    """float32, or the bits of a bfloat16 (int16) or of a float16 (uint16) -> float32."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        if sig.args[0] == types.float32:
            return args[0]
        if sig.args[0] == types.uint16:
            return builder.fpext(builder.bitcast(args[0], ir.HalfType()), _F32)
        high = builder.shl(builder.zext(args[0], _I32), ir.Constant(_I32, 16))
        return builder.bitcast(high, _F32)

    return types.float32(value), generate


@in_llvm
def _narrow(typing, value, like):
    """float32 -> the type of ``like``, as in :func:`_widen`, rounded to nearest even."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        x = args[0]
        if sig.args[1] == types.float32:
            return x
        i16 = ir.IntType(16)
        if sig.args[1] == types.uint16:
            return builder.bitcast(builder.fptrunc(x, ir.HalfType()), i16)
        bits = builder.bitcast(x, _I32)
        sixteen = ir.Constant(_I32, 16)
        odd = builder.and_(builder.lshr(bits, sixteen), ir.Constant(_I32, 1))
        rounded = builder.add(bits, builder.add(odd, ir.Constant(_I32, 0x7FFF)))
        top = builder.trunc(builder.lshr(rounded, sixteen), i16)
        # Rounding could carry a NaN into the sign bit.
        return builder.select(builder.fcmp_unordered("uno", x, x), ir.Constant(i16, 0x7FC0), top)

    return like(types.float32, like), generate


@compiled
def _exp2(x: np.float32) -> np.float32:
    """``2^x`` for x <= 0, float32, relative error 2e-7; 0 below -126.5, NaN for NaN.

    ``x = n + f`` with n the nearest integer: adding 1.5 * 2^23 leaves n in the low bits of the
    mantissa (with the exponent bias 127 already added), the polynomial is 2^f on [-1/2, 1/2]
    (Cephes, ``exp2f``).
    """
    magic = np.float32(12582912 + 127)
    x = np.float32(-127) if x < np.float32(-127) else x
    shifted = x + magic
    f = x - (shifted - magic)
    y = np.float32(1.535336188319500e-4)
    y = y * f + np.float32(1.339887440266574e-3)
    y = y * f + np.float32(9.618437357674640e-3)
    y = y * f + np.float32(5.550332471162809e-2)
    y = y * f + np.float32(2.402264791363012e-1)
    y = y * f + np.float32(6.931472028550421e-1)
    y = y * f + ONE
    return y * _float_of_bits(np.int32(_bits_of_float(shifted) << 23))


# --- packing --------------------------------------------------------------------------------------


@compiled
def _pack_queries(q: Raw, order: Longs, tile: int, factor: np.float32, packed: Floats) -> None:
    """The queries ``order [Lq]`` of one tile, rows of ``q [Lq, D]``, times ``factor`` -> ``packed
    [T/W, D, W]``."""
    lq, d = q.shape
    for g in range(GROUPS):
        for w in range(LANES):
            row = tile * TILE + g * LANES + w
            if row < lq:
                query = order[row]
                for j in range(d):
                    packed[g, j, w] = _widen(q[query, j]) * factor
            else:
                for j in range(d):
                    packed[g, j, w] = ZERO


@compiled
def pack(k: Raw, v: Raw, start: int, stop: int, keys: Floats, values: Floats) -> None:
    """Tiles ``[start, stop)`` of ``k, v [Lk, D]`` -> ``keys [Tk, T, D]``,
    ``values [Tk, Dp/W, T, W]``.
    """
    lk, d = k.shape
    groups = values.shape[1]
    for tile in range(start, stop):
        panels = keys[tile].reshape(TILE * d)
        for r in range(TILE):
            row = tile * TILE + r
            panel = r // BLOCK * BLOCK
            width = min(BLOCK, TILE - panel)
            for j in range(d):
                panels[panel * d + j * width + r - panel] = _widen(k[min(row, lk - 1), j])
            if row < lk:
                for g in range(groups):
                    for w in range(LANES):
                        j = g * LANES + w
                        values[tile, g, r, w] = _widen(v[row, j]) if j < d else ZERO
            else:
                values[tile, :, r, :] = ZERO


# --- attention ------------------------------------------------------------------------------------


@compiled
def _scores(keys: Floats, tile: int, queries: Floats, s: Floats, peak: Floats) -> None:
    """``s [T keys, T rows] = K_tile q^T`` in log2 units (the factor is in the queries); its maxima
    over the keys -> ``peak [T rows]``, in which a NaN counts as nothing.
    """
    d = keys.shape[2]
    group = d * LANES
    peak[:] = MINUS_INF
    for g in range(0, GROUPS, AT_ONCE):
        at = g * LANES
        top = peak[at : at + AT_ONCE * LANES]
        for r in range(0, BLOCK_END, BLOCK):
            c, k = r * TILE + at, (tile * TILE + r) * d
            _multiply(s, c, TILE, keys, k, 1, BLOCK, queries, at * d, group, d, BLOCK, AT_ONCE, top)
        c, k = BLOCK_END * TILE + at, (tile * TILE + BLOCK_END) * d
        _multiply(
            s, c, TILE, keys, k, 1, BLOCK_REST, queries, at * d, group, d, BLOCK_REST, AT_ONCE, top
        )


@compiled
def _add_values(s: Floats, values: Floats, tile: int, o: Floats) -> None:
    """``o [T rows, Dp] += P^T V_tile`` with the probabilities in ``s [T keys, T rows]``."""
    groups = values.shape[1]
    dp, group = groups * LANES, TILE * LANES
    for g in range(0, groups, AT_ONCE):
        c, v = g * LANES, (tile * groups + g) * group
        for r in range(0, BLOCK_END, BLOCK):
            _multiply(
                o, r * dp + c, dp, s, r, 1, TILE, values, v, group, TILE, BLOCK, AT_ONCE, None
            )
        r = BLOCK_END
        _multiply(
            o, r * dp + c, dp, s, r, 1, TILE, values, v, group, TILE, BLOCK_REST, AT_ONCE, None
        )


@compiled
def _softmax(
    s: Floats, n: int, m: Floats, total: Floats, alpha: Floats, peak: Floats, part: Floats
) -> None:
    """One step of the online softmax over the first ``n`` keys of ``s [T keys, T rows]``.

    ``s`` becomes ``2^(s - m)``, zero behind ``n``. All others are ``[T rows]``: ``m`` and ``total``
    are the running maximum and sum, ``alpha`` the factor for what was summed before, ``peak`` (only
    read) and ``part`` this tile's maximum and its sum relative to the new ``m``.
    """
    for r in range(TILE):
        top = peak[r] if peak[r] > m[r] else m[r]
        alpha[r] = _exp2(m[r] - top)
        m[r] = top
        part[r] = ZERO
    for key in range(n):
        for r in range(TILE):
            p = _exp2(s[key, r] - m[r])
            s[key, r] = p
            part[r] += p
    for key in range(n, TILE):
        for r in range(TILE):
            s[key, r] = ZERO
    for r in range(TILE):
        total[r] = total[r] * alpha[r] + part[r]


@compiled
def _scale_rows(o: Floats, alpha: Floats) -> None:
    """Rows of ``o [T, Dp]`` times ``alpha [T]``. After a few tiles few rows' maxima still move."""
    for r in range(TILE):
        if alpha[r] != ONE:
            for d in range(o.shape[1]):
                o[r, d] *= alpha[r]


@compiled
def _write_scores(
    index: Ints,
    count: int,
    rows: int,
    criterion: int,
    m: Floats,
    total: Floats,
    peak: Floats,
    top: Floats,
    part: Floats,
    score: Floats,
) -> None:
    """The visited tiles' scores against the rows' final ``m``, ``total`` -> ``score [Tk]``.

    ``peak, top, part [count, T]``: per visit and row the tile's maximum, the running maximum and
    the tile's sum relative to it.
    """
    for visit in range(count):
        worst = MINUS_INF
        for r in range(rows):
            if criterion == GAP:
                x = peak[visit, r] - m[r]
            else:
                x = part[visit, r] * _exp2(top[visit, r] - m[r]) / total[r]
            if x > worst or x != x:
                worst = x
        if criterion == MASS:
            worst = np.float32(math.log2(worst)) if worst > ZERO else LOWEST + worst
            worst = LOWEST if worst < LOWEST else worst
        score[index[visit]] = ZERO if worst > ZERO else worst


@compiled
def _write_rows(
    o: Floats, m: Floats, total: Floats, count: int, order: Longs, tile: int, out: Raw, lse: Floats
) -> None:
    """``o [T, Dp] / total`` -> the queries ``order [Lq]`` of one tile, rows of ``out [Lq, D]``;
    natural log of the sum -> ``lse [Lq]``."""
    lq, d = out.shape
    for r in range(min(TILE, lq - tile * TILE)):
        row = order[tile * TILE + r]
        inverse = ONE / total[r] if count > 0 else ZERO
        for j in range(d):
            out[row, j] = _narrow(o[r, j] * inverse, out[row, j])
        lse[row] = LN2 * (m[r] + math.log2(total[r])) if count > 0 else MINUS_INF


@compiled
def attend(
    q: Raw,
    order: Longs,
    keys: Floats,
    values: Floats,
    counts: Ints,
    index: Ints,
    start: int,
    stop: int,
    lk: int,
    factor: float,
    criterion: int,
    out: Raw,
    lse: Floats,
    score: Floats,
    work: tuple[Floats, Floats, Floats, Floats, Floats],
) -> None:
    """Query tiles ``[start, stop)`` of one head.

    ``factor`` is scale * log2(e). ``q, out [Lq, D]``, ``lse [Lq]``; row ``r`` of the tiles is the
    query ``order[r]``; ``keys, values`` from :func:`pack`; ``counts [Tq]``, ``index [Tq or 1,
    Tk]``, ``score [Tq or 0, Tk]``. ``work`` = queries ``[T/W, D, W]``, s ``[T, T]``, o ``[T, Dp]``,
    state ``[3, T]``, visits ``[3, Tk or 1, T]``.
    """
    queries, s, o, state, visits = work
    m, total, alpha = state[0], state[1], state[2]
    tk = keys.shape[0]
    for tile in range(start, stop):
        _pack_queries(q, order, tile, np.float32(factor), queries)
        m[:] = MINUS_INF
        total[:] = ZERO
        o[:] = ZERO
        count = counts[tile]
        row = index[tile if index.shape[0] > 1 else 0]
        if count > tk:
            raise IndexError("a row of the tile lists names more tiles than there are")
        for visit in range(count):
            j = row[visit]
            if j < 0 or j >= tk:
                raise IndexError("the tile lists name a key tile that does not exist")
            slot = visit if criterion else 0
            peak, top, part = visits[0, slot], visits[1, slot], visits[2, slot]
            _scores(keys, j, queries, s, peak)
            _softmax(s, min(TILE, lk - j * TILE), m, total, alpha, peak, part)
            top[:] = m
            _scale_rows(o, alpha)
            _add_values(s, values, j, o)
        _write_rows(o, m, total, count, order, tile, out, lse)
        if criterion:
            rows = min(TILE, q.shape[0] - tile * TILE)
            peak, top, part = visits[0], visits[1], visits[2]
            _write_scores(row, count, rows, criterion, m, total, peak, top, part, score[tile])


# --- what skipped tiles contribute ----------------------------------------------------------------


@compiled
def _all_live(live: Ints, first: int, n: int) -> bool:
    """Whether bits ``live [words]`` say so of the tiles ``first`` to ``first + n``."""
    for tile in range(first, first + n):
        if not live[tile >> 5] >> (tile & 31) & 1:
            return False
    return True


@compiled
def _score_means(
    live: Ints, first: int, n: int, log_count: Floats, s: Floats, peak: Floats
) -> None:
    """Scores ``s [T means, T rows]`` of the mean keys of the tiles ``first`` to ``first + n`` -> of
    the tiles: plus ``log_count [Tk]``, or ``-inf`` for tiles in ``live [words]``. Their maxima over
    the means -> ``peak``, in which a NaN counts as nothing.
    """
    peak[:] = MINUS_INF
    for mean in range(n):
        tile = first + mean
        if live[tile >> 5] >> (tile & 31) & 1:
            s[mean, :] = MINUS_INF
            continue
        for r in range(TILE):
            x = s[mean, r] + log_count[tile]
            s[mean, r] = x
            peak[r] = x if x > peak[r] else peak[r]


@compiled
def _merge_rows(
    o: Floats, m: Floats, total: Floats, gain: float, order: Longs, tile: int, out: Raw, lse: Floats
) -> None:
    """The queries ``order [Lq]`` of one tile, rows of ``out [Lq, D]`` with their natural ``lse
    [Lq]`` -> merged with ``gain`` times another part: its sums ``o [T, Dp]`` and ``total [T]``,
    relative to ``m [T]`` in log2 units.
    """
    lq, d = out.shape
    for r in range(min(TILE, lq - tile * TILE)):
        row = order[tile * TILE + r]
        ahead = LN2 * (m[r] + math.log2(total[r] * gain)) - lse[row]
        weight = np.float32(1 / (1 + math.exp(-ahead)))
        inverse = ONE / total[r]
        for j in range(d):
            x = _widen(out[row, j])
            out[row, j] = _narrow(x + weight * (o[r, j] * inverse - x), out[row, j])


@compiled
def add_skipped(
    q: Raw,
    order: Longs,
    keys: Floats,
    values: Floats,
    log_count: Floats,
    live: Ints,
    start: int,
    stop: int,
    factor: float,
    gain: float,
    out: Raw,
    lse: Floats,
    work: tuple[Floats, Floats, Floats, Floats, Floats],
) -> None:
    """Add to ``out`` what the skipped tiles contribute as means, ``gain`` times: query tiles
    ``[start, stop)`` of one head.

    As :func:`attend`, with a mean in place of each key tile: ``keys, values`` are their means from
    :func:`pack`, ``log_count [Tk]`` the log2 of how many keys each stands for, ``live [Tq, words]``
    the bits of the tiles in ``out``, whose log-sums are ``lse``. The twin is
    ``pooled.add_skipped``.
    """
    queries, s, o, state, visits = work
    m, total, alpha = state[0], state[1], state[2]
    peak, part = visits[0, 0], visits[1, 0]
    tk = log_count.shape[0]
    for tile in range(start, stop):
        if _all_live(live[tile], 0, tk):
            continue
        _pack_queries(q, order, tile, np.float32(factor), queries)
        m[:] = MINUS_INF
        total[:] = ZERO
        o[:] = ZERO
        for chunk in range(keys.shape[0]):
            first = chunk * TILE
            n = min(TILE, tk - first)
            if _all_live(live[tile], first, n):
                continue
            _scores(keys, chunk, queries, s, peak)
            _score_means(live[tile], first, n, log_count, s, peak)
            _softmax(s, n, m, total, alpha, peak, part)
            _scale_rows(o, alpha)
            _add_values(s, values, chunk, o)
        _merge_rows(o, m, total, gain, order, tile, out, lse)
