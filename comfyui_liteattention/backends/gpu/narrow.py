"""What comes before the attention kernel in the faster modes: q, k and v in fewer bits.

Keys and values are put in the order of the tile map, and averaged over its tiles, in the same pass.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...tiles import TileShape
from ...token_order import take
from ..base import Inputs, Narrowed, Pooled
from ..pooled import means_of
from . import qk_int8, scaled_values
from .kernel_table import (
    PEAK_VALUES,
    QUANTISE_KEYS,
    QUANTISE_QUERIES,
    QUERY_ROWS,
    SCALE_VALUES,
    Companion,
    Method,
    Values,
)
from .launch import DTYPE_NAMES, Argument, Launch, order_arguments


class Narrowing(NamedTuple):
    """Memory, and the ``launches`` that fill it, in this order; the means where they were asked
    for."""

    narrowed: Narrowed
    pooled: Pooled | None
    launches: tuple[Launch, ...]


class Side(NamedTuple):
    """Keys or values: the ``tokens`` in the order of the map, what undoes their narrowing, and the
    ``means [B, H, Tk, D]`` of the key tiles, which come with that."""

    tokens: Tensor
    unit: Tensor | None = None
    means: Tensor | None = None
    launches: tuple[Launch, ...] = ()


def narrow(
    call: Inputs, order: Tensor | None, method: Method, tile: TileShape, means: bool
) -> Narrowing:
    """``call``, its tokens as the model lists them -> the same for ``method``, in ``order``; and
    the ``means`` of the key tiles where they are asked for."""
    q, k, v, scale = call[:4]
    made, launches = Narrowed(q, k, v), []
    if method.int8:
        mean = qk_int8.mean_key(k)
        keys = _quantise_keys(k, order, mean, tile)
        queries, launch = _quantise_queries(q, mean, scale)
        made = made._replace(q=queries.values, q_unit=queries.unit, shift=queries.shift)
        launches.append(launch)
    else:
        keys = _listed(k, order)
    if method.values == "own":
        values = _listed(v, order)
    else:
        values = _scale_values(v, order, method.values, tile)
    return Narrowing(
        made._replace(k=keys.tokens, k_unit=keys.unit, v=values.tokens, v_unit=values.unit),
        _pooled(keys, values, tile.k) if means else None,
        (*keys.launches, *launches, *values.launches),
    )


def _pooled(keys: Side, values: Side, rows: int) -> Pooled:
    k, v = (means_of(x.tokens, rows) if x.means is None else x.means for x in (keys, values))
    return Pooled(k, v, keys.tokens.shape[2], rows)


def _listed(x: Tensor, order: Tensor | None) -> Side:
    """Keys or values in their own dtype."""
    return Side(x if order is None else take(x, order))


def _quantise_queries(q: Tensor, mean: Tensor, scale: float) -> tuple[qk_int8.Queries, Launch]:
    """Memory for the quantised queries, and the launch that fills it."""
    b, h, lq, d = q.shape
    to = qk_int8.Queries(
        q.new_empty(q.shape, dtype=torch.int8),
        *(q.new_empty(b, h, lq, dtype=torch.float32) for _ in range(2)),
    )
    kernel = Companion(QUANTISE_QUERIES, d, DTYPE_NAMES[q.dtype])
    arguments: tuple[Argument, ...] = (q, mean, *to, scale, *q.stride()[:3], h, lq)
    return to, Launch(kernel, (-(-lq // QUERY_ROWS), b * h), arguments)


def _quantise_keys(k: Tensor, order: Tensor | None, mean: Tensor, tile: TileShape) -> Side:
    """Memory for the quantised keys."""
    b, h, lk, d = k.shape
    tk = -(-lk // tile.k)
    tokens = k.new_empty(k.shape, dtype=torch.int8)
    unit = k.new_empty(b, h, tk * tile.k, dtype=torch.float32)
    means = k.new_empty(b, h, tk, d)
    rows, ordered = order_arguments(order, k)
    arguments: tuple[Argument, ...] = (
        *(k, mean, tokens, unit, means, rows),
        *(*k.stride()[:3], h, lk, ordered),
    )
    kernel = Companion(QUANTISE_KEYS, d, DTYPE_NAMES[k.dtype])
    return Side(tokens, unit, means, (Launch(kernel, (tk, b * h), arguments),))


def _scale_values(v: Tensor, order: Tensor | None, values: Values, tile: TileShape) -> Side:
    """Memory for the scaled values."""
    b, h, lk, d = v.shape
    tk = -(-lk // tile.k)
    shape = (b, h, d, tk * tile.k) if values == "e4m3" else (b, h, lk, d)
    tokens = v.new_empty(shape, dtype=scaled_values.DTYPES[values])
    unit = v.new_empty(b, h, d, dtype=torch.float32)
    means = v.new_empty(b, h, tk, d)
    peak = v.new_zeros(b, h, d, dtype=torch.int32)
    rows, ordered = order_arguments(order, v)
    dtype, grid = DTYPE_NAMES[v.dtype], (tk, b * h)
    find = Launch(Companion(PEAK_VALUES, d, dtype), grid, (v, peak, *v.stride()[:3], h, lk))
    arguments: tuple[Argument, ...] = (
        *(v, peak, tokens, unit, means, rows),
        *(*v.stride()[:3], h, lk, ordered),
    )
    scale = Launch(Companion(SCALE_VALUES, d, dtype, values), grid, arguments)
    return Side(tokens, unit, means, (find, scale))
