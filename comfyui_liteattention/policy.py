"""Scores and state -> the tiles to compute next time. Pure functions, no state.

A tile that is negligible at one call is skipped whole at the next calls of the same layer and
stream (temporal propagation, arXiv 2511.11062, section 4).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .settings import Settings
from .tiles import TileShape, tiles_touching
from .token_order import TokenRanges, VideoTokens

#: Golden ratio: successive multiples, taken modulo 1, spread evenly however many are drawn.
GOLDEN = (math.sqrt(5) - 1) / 2


def marks(settings: Settings, position: float) -> bool:
    """Whether a step marks tiles for skipping. ``position`` in (0, 1] is the part of the run that
    is done when the step ends."""
    return settings.skips and position > settings.warmup


def first_marking_step(settings: Settings, steps: int) -> int:
    """The first of ``steps`` steps whose calls can mark tiles."""
    return sum(not marks(settings, (step + 1) / steps) for step in range(steps))


def threshold_at(settings: Settings, position: float, key_tiles: int) -> float:
    """The score at or below which a tile is negligible, log2.

    ``position`` as in :func:`marks`. The ramp multiplies the allowance ``2**threshold`` by
    ``position**ramp``. For the mass criterion the row's allowance is divided evenly among its
    ``key_tiles``, so that it holds for any sequence length.
    """
    threshold = settings.threshold + settings.ramp * math.log2(position)
    return threshold - math.log2(key_tiles) if settings.criterion == "mass" else threshold


def pinned_tokens(
    ranges: TokenRanges,
    video: VideoTokens | None,
    length: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Tokens that are never skipped, ``[length]`` bool in the model's order: those in ``ranges``
    and, where the place of the video is known, all that are not video (text, references)."""
    pinned = torch.zeros(length, dtype=torch.bool, device=device)
    if video is not None:
        pinned[: video.start] = True
        pinned[video.stop :] = True
    for start, end in ranges:
        pinned[start:end] = True
    return pinned


def pinned_tiles(queries: Tensor, keys: Tensor, tile: TileShape) -> Tensor:
    """Tiles that must stay live, ``[Tq, Tk]`` bool, from the pinned tokens ``queries [Lq]`` and
    ``keys [Lk]`` bool, in the order in which the attention call lists them."""
    rows, columns = tiles_touching(queries, tile.q), tiles_touching(keys, tile.k)
    return rows.unsqueeze(1) | columns.unsqueeze(0)


def audited_tiles(call: int, query_tiles: int, period: int) -> range:
    """The query tiles to audit at the ``call``-th call: one in ``period`` of them over the calls.

    The golden-ratio sequence visits all of them evenly, however few calls a run has.
    """
    if period == 0:
        return range(0)
    count = (call + 1) * query_tiles // period - call * query_tiles // period
    if count == 0:
        return range(0)
    blocks = -(-query_tiles // count)
    start = math.floor(call * GOLDEN % 1.0 * blocks) * count
    return range(start, min(start + count, query_tiles))


def lost_mass(lse_kept: Tensor, lse_full: Tensor) -> Tensor:
    """Share of each row's softmax sum that the skipped tiles hold, 0..1, from natural-log LSEs.

    ``1 - exp(LSE_kept - LSE_full)``; the KL divergence of the kept from the full attention is
    ``LSE_full - LSE_kept`` exactly.
    """
    return -torch.expm1((lse_kept - lse_full).clamp(max=0))
