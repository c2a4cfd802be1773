"""Scores -> the next tile map -> lists, in plain PyTorch: the twin of ``gpu/tile_map.py``.

Both have the same four functions on packed bits; a card's are kernels.
"""

from __future__ import annotations

from torch import Tensor

from .. import policy
from ..budget import allocation
from ..budget.allocation import choose
from ..tiles import TileLists, pack, unpack
from ..tiles import make_lists as lists_of_mask

__all__ = ["choose", "histogram", "make_lists", "next_live"]


def next_live(
    live: Tensor | None, score: Tensor, threshold: float | Tensor, pinned: Tensor
) -> Tensor:
    """:func:`policy.next_live`, from and to bits ``[B, H, Tq, ceil(Tk/32)]`` int32."""
    mask = None if live is None else unpack(live, score.shape[-1])
    return pack(policy.next_live(mask, score, threshold, pinned))


def make_lists(live: Tensor, tk: int, alternate: bool = False) -> TileLists:
    """:func:`tiles.make_lists` of bits ``[B, H, Tq, ceil(Tk/32)]`` int32."""
    return lists_of_mask(unpack(live, tk), alternate)


def histogram(live: Tensor | None, score: Tensor, pinned: Tensor) -> Tensor:
    """:func:`allocation.histogram` of the tiles that are live (None: all) and not pinned."""
    droppable = ~pinned if live is None else unpack(live, score.shape[-1]) & ~pinned
    return allocation.histogram(score, droppable.expand(score.shape))
