"""What a backend is: the mechanism, without any policy.

A backend computes attention over the tiles that its lists name and reports, for every tile that it
computed, how much that tile mattered. What to do with the scores is ``policy.py``'s business.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from ..tiles import TileLists, TileShape
from ..token_order import take

if TYPE_CHECKING:
    from ..budget.allocation import Choice
    from .pooled import Agreement, Pooled

Criterion = Literal["mass", "gap"]

#: How q and k are multiplied: in their own dtype, or in 8 bits (see kernels/quantise.py), which is
#: faster on cards whose tensor cores are the limit, and less precise.
Qk = Literal["native", "int8"]

#: Some queries of a call: a run of them, or their numbers ``[N]`` int64.
Rows: TypeAlias = slice | Tensor


class Attended(NamedTuple):
    """The result of one attention call over the visited tiles.

    ``out [B, H, Lq, D]`` in the queries' dtype, normalised over the visited tiles.
    ``lse [B, H, Lq]`` float32, natural log of the softmax sum over the visited tiles.
    ``score [B, H, Tq, Tk]`` float32, log2, <= 0, ``-inf`` where a tile was not visited; None when
    no criterion was asked for.

    With ``s = scale * log2(e) * q k^T`` and ``m_r``, ``L_r`` the maximum and the log2-sum of row
    ``r``, and the outer maximum over the tile's rows below ``Lq``, the score is

    * ``gap``: ``max_r (max_j s_rj - m_r)``, the peak gap (arXiv 2511.11062, Eq. 7, there in
      natural log and against the running maximum);
    * ``mass``: ``max_r log2(sum_j 2^(s_rj - L_r))``, the largest share of a row's softmax sum that
      falls into the tile.
    """

    out: Tensor
    lse: Tensor
    score: Tensor | None


class Backend(Protocol):
    """One way to compute attention tile by tile."""

    name: str
    #: The score is taken against the maximum and the sum of the tiles visited so far, this one
    #: included: never below the score defined above, and 0 for the first tile visited.
    running_scores: bool

    def tile_shape(self, head_dim: int) -> TileShape:
        """Tile sides used for this head_dim; the lists passed to ``forward`` must fit them."""
        ...

    def unsupported(self, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        """Why these ``[B, H, L, D]`` tensors can't be computed here, or None."""
        ...

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        lists: TileLists | None = None,
        criterion: Criterion | None = None,
        order: Tensor | None = None,
    ) -> Attended:
        """Attention of ``q [B, H, Lq, D]``, ``k, v [B, H, Lk, D]`` (any strides) over the tiles
        in ``lists``; None means all of them, the same as lists that name them all (bit for bit,
        unless a compiler made the one and the other round differently; ``criterion`` likewise
        leaves ``out`` and ``lse`` as they are). Every query tile has at least one tile to visit.

        ``order [Lq]`` int64: row ``r`` of the tile map is the query ``order[r]``, each exactly
        once; None: as they come. The result stays in the order of ``q``."""
        ...

    def add_skipped(
        self,
        kept: Attended,
        q: Tensor,
        pooled: Pooled,
        scale: float,
        live: Tensor,
        factor: Tensor,
        order: Tensor | None = None,
    ) -> None:
        """Add the skipped tiles' means to a result: see :func:`.pooled.add_skipped`."""
        ...

    def audit_skipped(
        self,
        kept: Attended,
        q: Tensor,
        pooled: Pooled,
        scale: float,
        live: Tensor,
        full: Attended,
        audited: range,
        order: Tensor | None = None,
    ) -> Agreement:
        """How far those means agree with what is missing: see :func:`.pooled.audit_skipped`."""
        ...

    def tile_map(self, device: torch.device) -> TileMap | None:
        """Kernels that keep the tile map on this device, if there are any: see tile_map.py."""
        ...


class TileMap(Protocol):
    """Scores -> next live bits -> lists: kernels of a backend, or ``torch_tile_map.py``.

    Bits ``live [B, H, Tq, ceil(Tk/32)]`` int32 (None: all tiles are live), ``score [B, H, Tq, Tk]``
    float32, log2, ``pinned [Tq, Tk]`` bool. Nothing waits for a device.
    """

    def make_lists(self, live: Tensor, tk: int, alternate: bool = False) -> TileLists:
        """:func:`.tiles.make_lists`."""
        ...

    def next_live(
        self, live: Tensor | None, score: Tensor, threshold: float | Tensor, pinned: Tensor
    ) -> Tensor:
        """:func:`.policy.next_live`."""
        ...

    def histogram(self, live: Tensor | None, score: Tensor, pinned: Tensor) -> Tensor:
        """:func:`.allocation.histogram` of the tiles that are live and not pinned."""
        ...

    def choose(
        self,
        counts: Tensor,
        query_tiles: int,
        ledger: Tensor,
        lost: Tensor | None,
        start: float,
        others: Sequence[Tensor],
        aim: float,
    ) -> Choice:
        """:func:`.allocation.choose`."""
        ...


def forward_and_audit(
    backend: Backend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    lists: TileLists | None,
    criterion: Criterion | None,
    order: Tensor | None,
    audited: Rows,
) -> tuple[Attended, Attended]:
    """``backend.forward``, and the queries ``audited`` over all tiles. A backend that can prepare
    the keys once for both has a method of this name."""
    if hasattr(backend, "forward_and_audit"):
        return backend.forward_and_audit(q, k, v, scale, lists, criterion, order, audited)
    result = backend.forward(q, k, v, scale, lists, criterion, order)
    return result, backend.forward(pick(q, audited), k, v, scale)


def check_order(order: Tensor, lq: int) -> None:
    """Refuse an order that isn't one of ``lq`` queries."""
    if order.shape != (lq,) or order.dtype != torch.int64:
        raise ValueError(f"order {tuple(order.shape)}, {order.dtype}, for {lq} queries.")


def pick(q: Tensor, rows: Rows) -> Tensor:
    """Some of the queries ``q [B, H, Lq, D]``, with the heads inside or outside the tokens as these
    have them."""
    inside = q.stride(1) < q.stride(2)
    return take(q, rows) if inside and isinstance(rows, Tensor) else q[:, :, rows]


def rows_of(tiles: range, tile: TileShape, order: Tensor | None) -> Rows:
    """The queries of some query tiles; ``order``: see ``Backend.forward``."""
    rows = slice(tiles.start * tile.q, tiles.stop * tile.q)
    return rows if order is None else order[rows]


def empty_out(q: Tensor) -> Tensor:
    """An output for the queries ``q [B, H, Lq, D]``, with the heads inside or outside the tokens as
    these have them.

    So that ``out.transpose(1, 2).flatten(2)`` is free where the model keeps ``[B, L, H, D]``.
    """
    b, h, lq, d = q.shape
    if q.stride(1) < q.stride(2):
        return q.new_empty(b, lq, h, d).transpose(1, 2)
    return q.new_empty(b, h, lq, d)
