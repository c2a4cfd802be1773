"""The order of tokens in a sequence: each tile a compact piece of the video.

A model lists its video tokens frame by frame, row by row, so that a tile of 64 neighbours in the
list is a thin strip of the picture. What one strip attends to differs along its length, and a tile
can only be skipped when no row of it needs it. Tokens that are close in space and time look at the
same things: with a tile as close to a cube as the video allows, more tiles can go at the same loss.

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
    in the ranges ``apart``, in their order; then the video in compact pieces of a tile each."""
    is_video = np.zeros(length, dtype=bool)
    is_video[video.start : video.stop] = True
    for start, end in apart:
        is_video[start:end] = False
    first, rest = np.flatnonzero(~is_video), np.flatnonzero(is_video)
    filling = -len(first) % max(tile.q, tile.k)  # video that completes the tile where others end
    first, rest = np.append(first, rest[:filling]), rest[filling:]
    pieces = _pieces(rest - video.start, video.grid, tile)
    return torch.from_numpy(np.append(first, rest[pieces])).to(device)


@lru_cache(maxsize=8)
def arrange_part(
    grid: Grid, first: int, count: int, tile: TileShape, device: torch.device
) -> Tensor:
    """The same for ``count`` tokens of a video from its token ``first`` on, all of them in compact
    pieces; numbers count from ``first``."""
    return torch.from_numpy(_pieces(np.arange(first, first + count), grid, tile)).to(device)


def _pieces(tokens: np.ndarray, grid: Grid, tile: TileShape) -> np.ndarray:
    """The order in which ``tokens [N]`` of a video form compact pieces of a tile each."""
    places = np.stack(np.unravel_index(tokens, grid), axis=1)
    return compact_order(places, (max(tile.q, tile.k), min(tile.q, tile.k)))


def take(x: Tensor, order: Tensor) -> Tensor:
    """``x [B, H, L, D]`` with the tokens ``order``, heads inside the tokens in memory.

    As models hand their tokens over, so that whole rows of all heads are copied, and whoever joins
    the heads of a result again does so without a copy.
    """
    return x.transpose(1, 2).index_select(1, order).transpose(1, 2)


def put(x: Tensor, order: Tensor) -> Tensor:
    """``x`` back in the order from which :func:`take` took it."""
    listed = x.transpose(1, 2)
    back = torch.empty_like(listed, memory_format=torch.contiguous_format)
    return back.index_copy_(1, order, listed).transpose(1, 2)


def compact_order(places: np.ndarray, sizes: tuple[int, ...]) -> np.ndarray:
    """Order of points ``places [N, 3]`` in which every run of ``sizes[0]`` points, from the start,
    is a compact piece, and inside it every run of ``sizes[1]``, and so on.

    The points are halved across their longest side again and again, as in a k-d tree, each time at
    a multiple of the size, so that every piece but the last is full, whatever the grid.
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
