"""The tile map: which (query tile x key tile) blocks of one attention matrix are live.

One attention call of one layer and one stream has queries ``[B, H, Lq, D]`` and keys
``[B, H, Lk, D]``, cut into ``Tq x Tk`` tiles. The map is stored as one bit per tile,
``live [B, H, Tq, ceil(Tk/32)]`` int32, little end first: bit ``j % 32`` of word ``j // 32`` says
whether key tile ``j`` is computed. Kernels read the transient :class:`TileLists` made from it.

Pure tensor code: no policy, no host, no device dependence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

WORD_BITS = 32


@dataclass(frozen=True)
class TileShape:
    """Rows of a query tile and of a key tile."""

    q: int
    k: int

    def __post_init__(self) -> None:
        if self.q < 1 or self.k < 1:
            raise ValueError(f"tile sides must be at least 1 row, got {self.q} x {self.k}")

    def grid(self, lq: int, lk: int) -> tuple[int, int]:
        """Number of query and key tiles ``(Tq, Tk)`` that cover ``lq`` x ``lk`` tokens."""
        return -(-lq // self.q), -(-lk // self.k)


@dataclass(frozen=True)
class TileLists:
    """Key tiles to visit, per query tile, in visiting order.

    ``count [B, H, Tq]`` int32 and ``index [B, H, Tq, Tk]`` int32: the first ``count`` entries of a
    row of ``index`` are tile numbers; the rest is padding that nobody reads.
    """

    count: Tensor
    index: Tensor

    def to(self, device: torch.device | str) -> TileLists:
        return TileLists(self.count.to(device), self.index.to(device))


def pack(mask: Tensor) -> Tensor:
    """``mask [..., Tk]`` bool -> bits ``[..., ceil(Tk/32)]`` int32."""
    tk = mask.shape[-1]
    words = -(-tk // WORD_BITS)
    padded = torch.nn.functional.pad(mask, (0, words * WORD_BITS - tk))
    bits = padded.reshape(*mask.shape[:-1], words, WORD_BITS).to(torch.int64)
    shifts = torch.arange(WORD_BITS, device=mask.device)
    unsigned = (bits << shifts).sum(-1)
    # int64 -> int32 wraps the top bit into the sign, which is what a 32-bit word holds.
    return unsigned.to(torch.int32)


def unpack(live: Tensor, tk: int) -> Tensor:
    """Bits ``[..., W]`` int32 -> ``mask [..., tk]`` bool."""
    shifts = torch.arange(WORD_BITS, device=live.device, dtype=torch.int32)
    bits = (live.unsqueeze(-1) >> shifts) & 1
    return bits.flatten(-2)[..., :tk].bool()


def all_live(b: int, h: int, tq: int, tk: int, device: torch.device | str = "cpu") -> Tensor:
    """Bits of a map in which every tile is computed, ``[B, H, Tq, ceil(Tk/32)]`` int32."""
    return pack(torch.ones(b, h, tq, tk, dtype=torch.bool, device=device))


def make_lists(mask: Tensor, alternate: bool = False) -> TileLists:
    """``mask [B, H, Tq, Tk]`` bool -> lists that visit the live tiles in ascending order.

    With ``alternate`` they are visited in descending order, unless every tile of the map is live:
    then the lists stay what a dense call does, bit for bit.
    """
    tiles = torch.arange(mask.shape[-1], dtype=torch.int32, device=mask.device)
    upto = mask.cumsum(-1, dtype=torch.int32)  # live tiles up to and including this one
    count = upto[..., -1].contiguous()
    place = upto - 1
    if alternate:
        place = torch.where(mask.all(), place, count.unsqueeze(-1) - upto)
    # Dead tiles go behind the live ones, where nobody reads them.
    place = torch.where(mask, place, count.unsqueeze(-1) + tiles - upto)
    index = torch.empty_like(place).scatter_(-1, place.long(), tiles.expand(mask.shape))
    return TileLists(count, index)


def tiles_touching(tokens: Tensor, rows: int) -> Tensor:
    """Tiles of ``rows`` tokens that hold any of ``tokens [L]`` bool, ``[ceil(L/rows)]`` bool.

    A partly covered tile counts as covered: everything here rounds towards computing.
    """
    padded = torch.nn.functional.pad(tokens, (0, -len(tokens) % rows))
    return padded.unflatten(0, (-1, rows)).any(-1)
