"""One call of the attention kernel, whoever launches it: may it run, and what is to be launched."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ...tiles import TileLists, TileShape
from ..base import (
    Agreement,
    Attended,
    Criterion,
    Inputs,
    Narrowed,
    Pooled,
    Skipped,
    empty_out,
)
from ..constraints import Constraints, short
from .kernel_table import (
    ADD_SKIPPED,
    AUDIT_SKIPPED,
    HEAD_DIMS,
    NATIVE,
    POINTER_ALIGNMENT,
    STRIDE_ALIGNMENT,
    TILE,
    Companion,
    Method,
    Variant,
)
from .launch import DTYPE_NAMES, Argument, Launch, order_arguments
from .narrow import narrow

LOG2E = math.log2(math.e)
#: What the compiled code takes for granted.
CONSTRAINTS = Constraints(
    device="cuda",
    dtypes=tuple(DTYPE_NAMES),
    head_dims=HEAD_DIMS,
    alignment=POINTER_ALIGNMENT,
    stride=STRIDE_ALIGNMENT,
    most_heads=65535,  # the second side of a grid
    rows=max(TILE.q, TILE.k),
)


class Call(NamedTuple):
    """What to launch, in this order, and where the results will be: ``result``, and ``full`` of the
    audited queries, in the order of the map."""

    launches: tuple[Launch, ...]
    result: Attended
    full: Attended
    criterion: Criterion | None

    def finish(self) -> Attended:
        """The result, once everything is launched: mass scores are stored linear."""
        if self.criterion == "mass" and self.result.score is not None:
            self.result.score.log2_()
        return self.result


def prepare(
    call: Inputs,
    lists: TileLists | None,
    criterion: Criterion | None,
    tile: TileShape = TILE,
    method: Method = NATIVE,
    audited: range = range(0),
) -> Call:
    """Outputs and launches of one call. The tensors must have passed :data:`CONSTRAINTS`.

    ``audited``: query tiles that are done over all tiles as well, where there are lists."""
    q, k, v, scale, order, made = call
    if not scale > 0:
        raise ValueError(f"scale={scale}: the kernel takes positive scales only.")
    if audited and lists is None:
        raise ValueError("an audit is of a call with lists.")
    b, h, lq, d = q.shape
    lk = k.shape[2]
    tq, tk = tile.grid(lq, lk)
    result = allocate(q, k, lists is not None, criterion, tile)
    count, index = (lists.count, lists.index) if lists is not None else (None, None)
    if count is not None and index is not None:
        if count.shape != (b, h, tq) or index.shape != (b, h, tq, tk):
            raise ValueError(
                f"lists {tuple(count.shape)}, {tuple(index.shape)} don't fit a map of "
                f"{(b, h, tq, tk)} tiles."
            )
        count, index = _int32(count), _int32(index)
    queries = max(min(audited.stop * tile.q, lq) - audited.start * tile.q, 0)
    full = Attended(
        q.new_empty(b, h, queries, d), q.new_empty(b, h, queries, dtype=torch.float32), None
    )
    before: tuple[Launch, ...] = ()
    if made is None and method == NATIVE:
        made = Narrowed(q, k, v)
    elif made is None:
        made, _, before = narrow(call, None, method, tile, means=False)
    rows, ordered = order_arguments(order, q)
    arguments = (
        *(made.q, made.k, made.v, result.out),
        *(result.lse, result.score),
        *(count, index),
        *(made.q_unit, made.k_unit, made.shift, made.v_unit),
        *(full.out, full.lse, _ascending(tk, q.device) if audited else None, rows),
        scale * LOG2E,
        *made.q.stride()[:3],
        *made.k.stride()[:3],
        *made.v.stride()[:3],
        *result.out.stride()[:3],
        *(h, lq, lk, tk, ordered),
        *(audited.start, len(audited), queries),
    )
    variant = Variant(d, DTYPE_NAMES[q.dtype], lists is not None, criterion, method)
    launch = Launch(variant, (tq + len(audited), b * h), arguments)
    return Call((*before, launch), result, full, criterion)


def prepare_skipped(
    kept: Attended, skipped: Skipped, factor: Tensor, tile: TileShape = TILE
) -> Launch:
    """The launch that does :func:`.pooled.add_skipped` to a result of :func:`prepare`."""
    q, pooled, scale, live, order = skipped
    b, h, lq, d = q.shape
    tq, tk = _check_means(q, pooled, live, tile)
    rows, ordered = order_arguments(order, q)
    arguments: tuple[Argument, ...] = (
        *(q, pooled.keys, pooled.values, kept.out),
        *(kept.lse, live.contiguous(), factor.float().contiguous(), rows),
        scale * LOG2E,
        *q.stride()[:3],
        *kept.out.stride()[:3],
        *(h, lq, pooled.length, tk, live.shape[3], ordered),
    )
    return Launch(Companion(ADD_SKIPPED, d, DTYPE_NAMES[q.dtype]), (tq, b * h), arguments)


def prepare_audit(
    kept: Attended,
    skipped: Skipped,
    full: Attended,
    audited: range,
    tile: TileShape = TILE,
) -> tuple[Launch, Tensor]:
    """The launch that does :func:`.pooled.audit_skipped`, and the memory that it fills: sums over
    each query tile, ``[B, H, len(audited), 2]``. See :func:`agreement`."""
    q, pooled, scale, live, order = skipped
    b, h, lq, d = q.shape
    tq, tk = _check_means(q, pooled, live, tile)
    queries = min(audited.stop * tile.q, lq) - audited.start * tile.q
    if not audited or full.out.shape != (b, h, queries, d):
        raise ValueError(f"{tuple(full.out.shape)} isn't the result of query tiles {audited}.")
    sums = q.new_empty(b, h, len(audited), 2, dtype=torch.float32)
    rows, ordered = order_arguments(order, q)
    arguments: tuple[Argument, ...] = (
        *(q, pooled.keys, pooled.values, kept.out, kept.lse),
        *(full.out, full.lse, live.contiguous(), rows, sums),
        scale * LOG2E,
        *q.stride()[:3],
        *kept.out.stride()[:3],
        *full.out.stride()[:3],
        *(h, lq, pooled.length, tk, live.shape[3], ordered),
        *(audited.start, tq, queries),
    )
    kernel = Companion(AUDIT_SKIPPED, d, DTYPE_NAMES[q.dtype])
    return Launch(kernel, (len(audited), b * h), arguments), sums


def agreement(sums: Tensor) -> Agreement:
    """What the kernel has found, all query tiles together."""
    return Agreement(*sums.sum(2).unbind(-1))


def allocate(
    q: Tensor, k: Tensor, lists: bool, criterion: Criterion | None, tile: TileShape = TILE
) -> Attended:
    """Empty outputs."""
    b, h, lq, _ = q.shape
    tq, tk = tile.grid(lq, k.shape[2])
    out = empty_out(q)
    lse = q.new_empty(b, h, lq, dtype=torch.float32)
    if criterion is None:
        return Attended(out, lse, None)
    # Tiles that no list names keep this value: log2(0) = -inf for mass.
    never = 0.0 if criterion == "mass" else -math.inf
    score = q.new_empty(b, h, tq, tk, dtype=torch.float32)
    return Attended(out, lse, score.fill_(never) if lists else score)


def _check_means(q: Tensor, pooled: Pooled, live: Tensor, tile: TileShape) -> tuple[int, int]:
    """The grid of a map that the means and the tile bits fit."""
    b, h, lq, d = q.shape
    tq, tk = tile.grid(lq, pooled.length)
    if live.shape[:3] != (b, h, tq) or pooled.keys.shape != (b, h, tk, d):
        raise ValueError(
            f"tile bits {tuple(live.shape)} and means {tuple(pooled.keys.shape)} don't fit "
            f"{(b, h, tq, tk)} tiles."
        )
    return tq, tk


@lru_cache(maxsize=8)
def _ascending(tk: int, device: torch.device) -> Tensor:
    """The list of all key tiles."""
    return torch.arange(tk, dtype=torch.int32, device=device)


def _int32(tensor: Tensor) -> Tensor:
    if tensor.dtype != torch.int32:
        raise ValueError(f"tile lists are {short(tensor.dtype)}, the kernel takes int32.")
    return tensor.contiguous()
