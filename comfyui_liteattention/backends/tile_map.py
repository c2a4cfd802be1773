"""Scores -> the next tile map -> lists, in plain PyTorch: the twin of ``gpu/tile_map.py``.

A tile that is negligible at one call is skipped whole at the next calls of the same layer and
stream (temporal propagation, arXiv 2511.11062, section 4). Both have the same four functions on
packed bits ``live [B, H, Tq, ceil(Tk/32)]`` int32; a card's are kernels.
"""

from __future__ import annotations

from torch import Tensor

from ..budget import allocation
from ..budget.allocation import Limit, choose
from ..tiles import TileLists, pack, unpack
from ..tiles import make_lists as lists_of_mask

__all__ = ["choose", "histogram", "make_lists", "mark", "next_live"]


def next_live(live: Tensor | None, score: Tensor, limit: float | Limit, pinned: Tensor) -> Tensor:
    """:func:`mark`, from and to bits."""
    mask = None if live is None else unpack(live, score.shape[-1])
    return pack(mark(mask, score, limit, pinned))


def mark(live: Tensor | None, score: Tensor, limit: float | Limit, pinned: Tensor) -> Tensor:
    """Live tiles of the next call, ``[B, H, Tq, Tk]`` bool.

    ``live [B, H, Tq, Tk]`` bool (None: all) and ``score [B, H, Tq, Tk]`` float32, log2, belong to
    this call; ``limit``: the score at or below which a tile goes, or more (:class:`Limit`);
    ``pinned [Tq, Tk]`` bool. The best tile of every query tile stays, whatever the limit, and a
    score that is not a number never drops a tile.
    """
    kept = ~(score <= (limit.score if isinstance(limit, Limit) else limit))
    if live is not None:
        kept &= live
    if isinstance(limit, Limit):
        kept |= limit.all_back
    kept.scatter_(-1, score.argmax(-1, keepdim=True), True)
    return kept | pinned


def make_lists(live: Tensor, tk: int, alternate: bool = False) -> TileLists:
    """:func:`tiles.make_lists` of bits."""
    return lists_of_mask(unpack(live, tk), alternate)


def histogram(live: Tensor | None, score: Tensor, pinned: Tensor) -> Tensor:
    """:func:`allocation.histogram` of the tiles that are live (None: all) and not pinned."""
    droppable = ~pinned if live is None else unpack(live, score.shape[-1]) & ~pinned
    return allocation.histogram(score, droppable.expand(score.shape))
