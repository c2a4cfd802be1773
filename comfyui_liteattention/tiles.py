"""The tile map: which (query tile x key tile) blocks of one attention matrix are live.

One attention call of one layer and one stream has queries ``[B, H, Lq, D]`` and keys
``[B, H, Lk, D]``, cut into ``Tq x Tk`` tiles. The map is stored as one bit per tile,
``live [B, H, Tq, ceil(Tk/32)]`` int32, little end first: bit ``j % 32`` of word ``j // 32`` says
whether key tile ``j`` is computed. Kernels read :class:`TileLists`, made from it for each call.

Pure tensor code: no policy, no host, no device dependence.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

WORD_BITS = 32
#: Tiles of a map that are listed at once, which bounds the memory needed.
PART = 1 << 22


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
    padded = torch.nn.functional.pad(mask, (0, -mask.shape[-1] % WORD_BITS)).to(torch.uint8)
    octets = (padded.unflatten(-1, (-1, 8)) * _bits(mask.device)).sum(-1, dtype=torch.uint8)
    return octets.view(torch.int32)


def unpack(live: Tensor, tk: int) -> Tensor:
    """Bits ``[..., W]`` int32 -> ``mask [..., tk]`` bool."""
    octets = live.view(torch.uint8).unsqueeze(-1)
    return (octets & _bits(live.device)).ne(0).flatten(-2)[..., :tk]


@lru_cache(maxsize=8)  # copying it to the device again would wait for the device
def _bits(device: torch.device) -> Tensor:
    """The values of the bits of a byte. Words are handled as bytes, little end first as on all
    machines that torch runs on, because a whole map widened to words would be large."""
    return torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=device)


def all_live(b: int, h: int, tq: int, tk: int, device: torch.device | str = "cpu") -> Tensor:
    """Bits of a map in which every tile is computed, ``[B, H, Tq, ceil(Tk/32)]`` int32."""
    return pack(torch.ones(b, h, tq, tk, dtype=torch.bool, device=device))


def make_lists(mask: Tensor, alternate: bool = False) -> TileLists:
    """``mask [B, H, Tq, Tk]`` bool -> lists that visit the live tiles in ascending order.

    With ``alternate`` they are visited in descending order, unless every tile of the map is live:
    such a call stays bit for bit what a dense call is.
    """
    count = mask.sum(-1, dtype=torch.int32)
    index = torch.empty(mask.shape, dtype=torch.int32, device=mask.device)
    backwards = ~mask.all() if alternate else None
    tiles = torch.arange(mask.shape[-1], dtype=torch.int32, device=mask.device)
    # In parts: scatter_ needs 64-bit places, which for all heads at once would take much memory.
    rows, out = mask.flatten(0, -2), index.flatten(0, -2)
    step = max(1, PART // mask.shape[-1])
    for part, into in zip(rows.split(step), out.split(step), strict=True):
        upto = part.cumsum(-1, dtype=torch.int32)  # live tiles up to and including this one
        live = upto[:, -1:]
        place = upto - 1
        if backwards is not None:
            place = torch.where(backwards, live - upto, place)
        place = torch.where(part, place, live + tiles - upto)  # the others follow
        into.scatter_(-1, place.long(), tiles.expand(part.shape))
    return TileLists(count, index)


def tiles_touching(tokens: Tensor, rows: int) -> Tensor:
    """Tiles of ``rows`` tokens that hold any of ``tokens [L]`` bool, ``[ceil(L/rows)]`` bool.

    A tile that is touched only in part counts: when in doubt, a tile is computed.
    """
    padded = torch.nn.functional.pad(tokens, (0, -len(tokens) % rows))
    return padded.unflatten(0, (-1, rows)).any(-1)
