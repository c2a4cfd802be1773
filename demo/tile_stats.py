"""What could be skipped: peak gap and mass of every tile of a dense attention call.

With s = scale * log2(e) * q k^T (log2 units), tile (i, j) covers `tile` query rows x `tile` keys:

    gap[i, j]  = max over rows r of (max of s_r inside the tile - max of s_r over all keys)   <= 0
    mass[i, j] = max over rows r of the share of the row's softmax that falls in the tile     0..1

A tile is negligible when gap <= threshold, or when mass < eps.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch.nn import functional


class TileScores(NamedTuple):
    gap: torch.Tensor  # [B, H, Tq, Tk] log2 units, <= 0
    mass: torch.Tensor  # [B, H, Tq, Tk] share of the softmax, 0..1


def tile_scores(
    q: torch.Tensor, k: torch.Tensor, tile: int = 64, scale: float | None = None
) -> TileScores:
    """q [B, H, N, D], k [B, H, M, D] -> gap and mass of all tiles, computed in float32.

    One strip of `tile` query rows at a time, so the full score matrix never exists.
    """
    n, m = q.shape[-2], k.shape[-2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    keys = (k.float() * (scale * math.log2(math.e))).transpose(-1, -2)
    pad = -m % tile
    gaps, masses = [], []
    for start in range(0, n, tile):
        s = q[..., start : start + tile, :].float() @ keys
        s = s - s.amax(-1, keepdim=True)
        p = torch.exp2(s)
        share = (
            functional.pad(p / p.sum(-1, keepdim=True), (0, pad)).unflatten(-1, (-1, tile)).sum(-1)
        )
        peak = functional.pad(s, (0, pad), value=-math.inf).unflatten(-1, (-1, tile)).amax(-1)
        gaps.append(peak.amax(-2))
        masses.append(share.amax(-2))
    return TileScores(torch.stack(gaps, -2), torch.stack(masses, -2))


def negligible(
    scores: TileScores, gap: float | None = None, mass: float | None = None
) -> torch.Tensor:
    """Bool [B, H, Tq, Tk]: True where the tile may be skipped. Give exactly one threshold."""
    if gap is not None and mass is None:
        return scores.gap <= gap
    if mass is not None and gap is None:
        return scores.mass < mass
    raise ValueError("give either gap (log2 units, negative) or mass (a share), not both")


def persistence(now: torch.Tensor, later: torch.Tensor) -> float:
    """Share of the tiles negligible now that still are later; nan when there are none."""
    count = int(now.sum())
    return float((now & later).sum()) / count if count else math.nan
