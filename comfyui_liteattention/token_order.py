"""The order of tokens in a sequence: each tile a compact piece of the video.

A model lists its video tokens frame by frame, row by row, so that a tile of 64 neighbours in the
list is a thin strip of the picture. The two ends of a strip attend to different things, and a tile
can only be skipped when no row needs it. Tokens close in space and time attend to the same things:
the closer a tile is to a cube of the video, the more tiles can be skipped at the same loss
(docs/measured.md, "Which order of the tokens").

Attention does not care in which order its tokens are listed (positions are in q and k already),
so the order may be chosen freely. Pure functions; nothing here knows a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .tiles import TileShape

TokenOrder = Literal["compact", "raster"]
TokenRanges = tuple[tuple[int, int], ...]
Grid = tuple[int, int, int]


@dataclass(frozen=True)
class VideoTokens:
    """Where the video lies in a sequence: ``grid`` (frames, rows, columns) of tokens in raster
    order, the first of them at ``start``. All other tokens (text, references) are not video."""

    grid: Grid
    start: int = 0

    @property
    def stop(self) -> int:
        frames, rows, columns = self.grid
        return self.start + frames * rows * columns


@lru_cache(maxsize=8)  # every layer of every step asks for the same few
def arrange(
    length: int, video: VideoTokens, apart: TokenRanges, tile: TileShape, device: torch.device
) -> Tensor:
    """Which token is listed at each place, ``[length]`` int64: first all that are not video or lie
    in the ranges ``apart``, in the model's order; then the video in compact tile-sized pieces."""
    is_video = np.zeros(length, dtype=bool)
    is_video[video.start : video.stop] = True
    for start, end in apart:
        is_video[start:end] = False
    first, rest = np.flatnonzero(~is_video), np.flatnonzero(is_video)
    filling = -len(first) % max(tile.q, tile.k)  # video tokens that fill up the last of these tiles
    first, rest = np.append(first, rest[:filling]), rest[filling:]
    pieces = _pieces(rest - video.start, video.grid, tile)
    return torch.from_numpy(np.append(first, rest[pieces])).to(device)


@lru_cache(maxsize=8)
def arrange_part(
    grid: Grid, first: int, count: int, tile: TileShape, device: torch.device
) -> Tensor:
    """The same for ``count`` tokens of a video from its token ``first`` on, all in compact pieces;
    the tokens are numbered from ``first``."""
    return torch.from_numpy(_pieces(np.arange(first, first + count), grid, tile)).to(device)


def _pieces(tokens: np.ndarray, grid: Grid, tile: TileShape) -> np.ndarray:
    """The order in which ``tokens [N]`` of a video form compact tile-sized pieces."""
    places = np.stack(np.unravel_index(tokens, grid), axis=1)
    return compact_order(places, (max(tile.q, tile.k), min(tile.q, tile.k)))


def take(x: Tensor, order: Tensor) -> Tensor:
    """The tokens ``order`` of ``x [B, H, L, D]``, laid out in memory as ``[B, L, H, D]``.

    Models hand their tokens over in this layout, so that a token's heads are copied in one piece,
    and joining the heads of a result takes no copy.
    """
    return x.transpose(1, 2).index_select(1, order).transpose(1, 2)


def put(x: Tensor, order: Tensor) -> Tensor:
    """``x`` back in the order from which :func:`take` took it."""
    listed = x.transpose(1, 2)
    back = torch.empty_like(listed, memory_format=torch.contiguous_format)
    return back.index_copy_(1, order, listed).transpose(1, 2)


def compact_order(places: np.ndarray, sizes: tuple[int, ...]) -> np.ndarray:
    """Order of points ``places [N, 3]`` in which each consecutive ``sizes[0]`` points form a
    compact piece, within it each consecutive ``sizes[1]``, and so on.

    The points are halved across their longest side again and again, as in a k-d tree, each time at
    a multiple of the size, so that all pieces but the last are full, whatever the grid.
    """
    order = np.empty(len(places), dtype=np.int64)
    work = [(np.arange(len(places)), sizes, 0)]
    while work:
        members, left, at = work.pop()
        while left and len(members) <= left[0]:
            left = left[1:]
        if not left:
            order[at : at + len(members)] = members
            continue
        here = places[members]
        longest = np.argsort(np.ptp(here, axis=0), kind="stable")  # the longest side last
        ranked = members[np.lexsort([here[:, axis] for axis in longest])]
        half = -(-len(members) // left[0]) // 2 * left[0]
        work += [(ranked[:half], left, at), (ranked[half:], left, at + half)]
    return order
