"""What comes before the attention kernel in the faster modes: q, k and v in fewer bits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...tiles import TileShape
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
from .launch import DTYPE_NAMES, Argument, Launch


class Narrowed(NamedTuple):
    """``q, k, v`` as the kernel multiplies them, and what it needs to undo it; None where nothing
    was done. ``launches`` fill that memory, in this order."""

    q: Tensor
    k: Tensor
    v: Tensor
    launches: tuple[Launch, ...] = ()
    q_unit: Tensor | None = None
    k_unit: Tensor | None = None
    shift: Tensor | None = None
    v_unit: Tensor | None = None


def narrow(
    q: Tensor, k: Tensor, v: Tensor, scale: float, method: Method, tile: TileShape
) -> Narrowed:
    """``q [B, H, Lq, D]``, ``k, v [B, H, Lk, D]`` -> the same for ``method``."""
    made = Narrowed(q, k, v)
    if method.int8:
        mean = qk_int8.mean_key(k)
        keys, make_keys = _quantise_keys(k, mean, tile)
        queries, make_queries = _quantise_queries(q, mean, scale)
        made = Narrowed(
            *(queries.values, keys.values, v),
            (make_keys, make_queries),
            *(queries.unit, keys.unit, queries.shift),
        )
    if method.values != "own":
        scaled, make_values = _scale_values(v, method.values, tile)
        launches = (*made.launches, *make_values)
        made = made._replace(v=scaled.values, v_unit=scaled.unit, launches=launches)
    return made


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


def _quantise_keys(k: Tensor, mean: Tensor, tile: TileShape) -> tuple[qk_int8.Keys, Launch]:
    """Memory for the quantised keys, and the launch that fills it."""
    b, h, lk, d = k.shape
    tk = -(-lk // tile.k)
    to = qk_int8.Keys(
        k.new_empty(k.shape, dtype=torch.int8),
        k.new_empty(b, h, tk * tile.k, dtype=torch.float32),
    )
    kernel = Companion(QUANTISE_KEYS, d, DTYPE_NAMES[k.dtype])
    return to, Launch(kernel, (tk, b * h), (k, mean, *to, *k.stride()[:3], h, lk))


def _scale_values(
    v: Tensor, values: Values, tile: TileShape
) -> tuple[scaled_values.Scaled, tuple[Launch, Launch]]:
    """Memory for the scaled values, and the launches that fill it."""
    b, h, lk, d = v.shape
    tk = -(-lk // tile.k)
    shape = (b, h, d, tk * tile.k) if values == "e4m3" else (b, h, lk, d)
    to = scaled_values.Scaled(
        v.new_empty(shape, dtype=scaled_values.DTYPES[values]),
        v.new_empty(b, h, d, dtype=torch.float32),
    )
    peak = v.new_zeros(b, h, d, dtype=torch.int32)
    dtype, rest = DTYPE_NAMES[v.dtype], (*v.stride()[:3], h, lk)
    find = Launch(Companion(PEAK_VALUES, d, dtype), (tk, b * h), (v, peak, *rest))
    scale = Companion(SCALE_VALUES, d, dtype, values)
    return to, (find, Launch(scale, (tk, b * h), (v, peak, *to, *rest)))
