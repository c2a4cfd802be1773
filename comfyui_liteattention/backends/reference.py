"""The truth: tile attention written as the formulas, in float64 by default.

Slow and plain on purpose. Every other backend is compared with this one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..tiles import TileLists, TileShape
from .base import (
    Agreement,
    Attended,
    Backend,
    Criterion,
    Inputs,
    Skipped,
    check_order,
    some_of,
)
from .pooled import PoolingBackend, add_skipped, audit_skipped

LOG2E = math.log2(math.e)


class ReferenceBackend(PoolingBackend):
    """Plain PyTorch twin of every kernel. See :class:`~.base.Backend`."""

    name = "reference"
    running_scores = False

    def __init__(
        self, tile: TileShape = TileShape(64, 64), dtype: torch.dtype = torch.float64
    ) -> None:
        self.tile = tile
        self.dtype = dtype

    def tile_shape(self, head_dim: int) -> TileShape:
        return self.tile

    def unsupported(self, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        return None

    def provide(self, device: torch.device, head_dim: int, dtype: torch.dtype) -> Backend:
        return self

    def forward(
        self, call: Inputs, lists: TileLists | None = None, criterion: Criterion | None = None
    ) -> Attended:
        q, k, v, scale, order = call[:5]
        if order is not None:
            check_order(order, q.shape[2])
            q = q[:, :, order]
        b, h, lq, _ = q.shape
        lk = k.shape[2]
        tq, tk = self.tile.grid(lq, lk)
        visited = _visited_mask(lists, (b, h, tq, tk), q.device)

        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = torch.empty(b, h, lq, dtype=torch.float32, device=q.device)
        score = torch.empty(b, h, tq, tk, dtype=torch.float32, device=q.device)
        k64, v64 = k.to(self.dtype), v.to(self.dtype)
        for i in range(tq):
            rows = slice(i * self.tile.q, min((i + 1) * self.tile.q, lq))
            s = (q[:, :, rows].to(self.dtype) @ k64.mT) * (scale * LOG2E)  # [B, H, BM, Lk]
            keys = visited[:, :, i].repeat_interleave(self.tile.k, dim=-1)[..., :lk]
            s = s.masked_fill(~keys.unsqueeze(2), -math.inf)
            log_sum = torch.logsumexp(s * math.log(2), -1) * LOG2E  # [B, H, BM], log2
            # Not a weight of 0: what nobody visits may be anything, and 0 times NaN isn't 0.
            seen = v64 if lists is None else v64.masked_fill(~keys.unsqueeze(-1), 0)
            out[:, :, rows] = (torch.exp2(s - log_sum.unsqueeze(-1)) @ seen).to(out.dtype)
            lse[:, :, rows] = (log_sum * math.log(2)).float()
            tiles = _split_tiles(s, tk, self.tile.k)  # [B, H, BM, Tk, BN]
            if criterion == "gap":
                per_row = tiles.amax(-1) - s.amax(-1, keepdim=True)
            else:
                per_row = torch.logsumexp(tiles * math.log(2), -1) * LOG2E - log_sum.unsqueeze(-1)
            score[:, :, i] = per_row.amax(2).clamp(max=0).float()
        if order is not None:
            place = order.argsort()
            out, lse = out[:, :, place], lse[:, :, place]
        return Attended(out, lse, score if criterion else None)

    def forward_and_audit(
        self, call: Inputs, lists: TileLists, criterion: Criterion | None, audited: range
    ) -> tuple[Attended, Attended]:
        kept = self.forward(call, lists, criterion)
        return kept, self.forward(some_of(call, audited, self.tile))

    def add_skipped(self, kept: Attended, skipped: Skipped, factor: Tensor) -> None:
        add_skipped(kept, skipped, factor, self.tile)

    def audit_skipped(
        self, kept: Attended, skipped: Skipped, full: Attended, audited: range
    ) -> Agreement:
        return audit_skipped(kept, skipped, full, audited, self.tile)

    def tile_map(self, device: torch.device) -> None:
        return None


def _visited_mask(lists: TileLists | None, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Lists -> ``[B, H, Tq, Tk]`` bool."""
    if lists is None:
        return torch.ones(shape, dtype=torch.bool, device=device)
    valid = torch.arange(shape[-1], device=device) < lists.count.unsqueeze(-1)
    visits = torch.zeros(shape, dtype=torch.int32, device=device)
    return visits.scatter_add(-1, lists.index.long(), valid.int()) > 0


def _split_tiles(s: Tensor, tk: int, rows: int) -> Tensor:
    """``[B, H, BM, Lk]`` -> ``[B, H, BM, Tk, BN]``, padded with -inf."""
    padded = torch.nn.functional.pad(s, (0, tk * rows - s.shape[-1]), value=-math.inf)
    return padded.unflatten(-1, (tk, rows))
