"""Tiles reduced to one key each: the mean of their keys, with the mean of their values.

A skipped tile of ``n`` keys still contributes, as its mean key counted ``n`` times; tail.py decides
how much weight that is given. This is plain PyTorch for any device, and the reference for backends
with kernels of their own.
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from ..tiles import PART, TileShape, unpack
from ..token_order import take
from .base import Agreement, Attended, Inputs, Pooled, Skipped, pick, rows_of
from .merge import merge

#: Upper limit for the log of a ratio of softmax sums, so that its square stays finite in float32.
LARGEST_LOG_SHARE = 20.0


class Part(NamedTuple):
    """Attention to a part of the keys: ``out [B, H, L, D]`` and natural ``lse [B, H, L]``, both
    float32 or wider; the LSE is ``-inf`` and the output 0 where the part is empty."""

    out: Tensor
    lse: Tensor


class PoolingBackend:
    """What backends have in common that leave order and means to torch."""

    tile: TileShape

    def in_order(
        self, call: Inputs, order: Tensor | None, means: bool
    ) -> tuple[Inputs, Pooled | None]:
        """See :meth:`.Backend.in_order`."""
        if order is not None:
            call = call._replace(k=take(call.k, order), v=take(call.v, order), order=order)
        # Now, while k and v are in the caches.
        return call, pool(call.k, call.v, self.tile.k) if means else None


def pool(k: Tensor, v: Tensor, rows: int) -> Pooled:
    """Means of ``k, v [B, H, Lk, D]`` over tiles of ``rows`` keys; the last one may hold fewer."""
    return Pooled(means_of(k, rows), means_of(v, rows), k.shape[2], rows)


def means_of(x: Tensor, rows: int) -> Tensor:
    """``x [B, H, L, D]`` -> ``[B, H, ceil(L / rows), D]``."""
    full = x.shape[2] // rows * rows
    parts = [x[:, :, :full].unflatten(2, (-1, rows)).mean(3, dtype=torch.float32)]
    if full < x.shape[2]:
        parts.append(x[:, :, full:].mean(2, keepdim=True, dtype=torch.float32))
    return torch.cat(parts, 2).to(x.dtype)


def skipped_part(q: Tensor, pooled: Pooled, scale: float, live: Tensor, rows: int) -> Part:
    """Attention of ``q [B, H, L, D]`` to the means of the tiles that are not in ``live
    [B, H, ceil(L / rows), Tk]`` bool."""
    wide = torch.promote_types(q.dtype, torch.float32)
    kept = live.repeat_interleave(rows, 2)[:, :, : q.shape[2]]
    score = (q.to(wide) @ (pooled.keys.to(wide) * scale).mT).add_(pooled.log_count)
    score.masked_fill_(kept, -torch.inf)
    top = score.amax(-1, keepdim=True)
    share = score.sub_(top.nan_to_num(neginf=0.0)).exp_()
    total = share.sum(-1, keepdim=True)
    out = (share @ pooled.values.to(wide)).div_(total.clamp(min=1e-30))
    return Part(out, (top + total.log()).squeeze(-1))


def compare(kept: Attended, part: Part, full: Attended) -> Agreement:
    """How well ``part``, the means of skipped tiles, predicts what ``kept`` lacks of ``full``; all
    three for the same queries."""
    share = (part.lse - kept.lse).clamp(max=LARGEST_LOG_SHARE).exp().unsqueeze(-1)
    growth = (full.lse - kept.lse).clamp(0, LARGEST_LOG_SHARE).exp().unsqueeze(-1)
    out = kept.out.float()
    added, missing = share * (part.out - out), growth * (full.out.float() - out)
    return Agreement((added * missing).sum((2, 3)), added.square().sum((2, 3)))


def audit_skipped(
    kept: Attended, skipped: Skipped, full: Attended, audited: range, tile: TileShape
) -> Agreement:
    """:func:`compare` for the query tiles ``audited``, whose exact result is ``full``. Call it
    before :func:`add_skipped`, which changes ``kept``."""
    q, pooled, scale, live, order = skipped
    rows = rows_of(audited, tile, order)
    some = unpack(live[:, :, audited.start : audited.stop], pooled.keys.shape[2])
    part = skipped_part(pick(q, rows), pooled, scale, some, tile.q)
    return compare(Attended(kept.out[:, :, rows], kept.lse[:, :, rows], None), part, full)


def add_skipped(kept: Attended, skipped: Skipped, factor: Tensor, tile: TileShape) -> None:
    """Add what the skipped tiles contribute to ``kept.out`` in place, ``factor [B, H]`` times.

    With ``t`` and ``M`` the output and LSE of the skipped part, this is :func:`.merge.merge` with
    ``t`` at ``M + ln factor``. Rows without a skipped tile keep their bits.
    """
    q, pooled, scale, live, order = skipped
    tk = pooled.keys.shape[2]
    step = max(1, PART // (tile.q * tk))  # query tiles at once
    for b, h in product(*map(range, live.shape[:2])):
        head = (slice(b, b + 1), slice(h, h + 1))
        means = pooled._replace(keys=pooled.keys[head], values=pooled.values[head])
        for start in range(0, live.shape[2], step):
            some = unpack(live[head][:, :, start : start + step], tk)
            rows = rows_of(range(start, start + step), tile, order)
            out, lse = kept.out[head][:, :, rows], kept.lse[head][:, :, rows]
            part = skipped_part(q[head][:, :, rows], means, scale, some, tile.q)
            merged, _ = merge(out, lse, part.out, part.lse + factor[head].log().unsqueeze(-1))
            kept.out[head][:, :, rows] = merged.to(out.dtype)
