"""What a backend is: the mechanism, without any policy.

A backend computes attention over the tiles that its lists name and gives every tile that it
computed a score: how much that tile mattered. What to do with the scores is decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from ..budget.allocation import Choice, Limit
from ..tiles import TileLists, TileShape
from ..token_order import take

Criterion = Literal["mass", "gap"]

#: How a card multiplies: as precisely as 16 bits do; q k in INT8; or that, and p v in FP8. The
#: later, the faster and the less precise. gpu/kernel_table.py says what each is on which card.
Mode = Literal["native", "int8", "fp8"]

#: Some queries of a call: a run of them, or their numbers ``[N]`` int64.
Rows: TypeAlias = slice | Tensor


class Narrowed(NamedTuple):
    """``q, k, v`` of a call as a card's mode multiplies them, ``k`` and ``v`` in the order of the
    tile map, and what undoes it; None where nothing has to be undone. See gpu/narrow.py."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_unit: Tensor | None = None
    k_unit: Tensor | None = None
    shift: Tensor | None = None
    v_unit: Tensor | None = None


class Inputs(NamedTuple):
    """What one call of attention is computed from.

    ``q [B, H, Lq, D]``, ``k, v [B, H, Lk, D]`` (any strides), the latter in the order of the tile
    map. ``order [Lq]`` int64: row ``r`` of the map is the query ``order[r]``, each exactly once;
    None: as they come. The result stays in the order of ``q``. ``narrowed``: what a backend has
    made of ``q, k, v`` already (:meth:`Backend.in_order`); ``k`` and ``v`` are in any order then.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    order: Tensor | None = None
    narrowed: Narrowed | None = None


class Attended(NamedTuple):
    """The result of one attention call over the visited tiles.

    ``out [B, H, Lq, D]`` in the queries' dtype, normalised over the visited tiles.
    ``lse [B, H, Lq]`` float32, natural log of the softmax sum over the visited tiles.
    ``score [B, H, Tq, Tk]`` float32, log2, <= 0, ``-inf`` where a tile was not visited; None when
    no criterion was asked for.

    Let ``s = scale * log2(e) * q k^T``, and ``m_r`` and ``L_r`` the maximum and the log2 of the
    softmax sum of row ``r``. With the outer maximum over the tile's rows below ``Lq``, the score is

    * ``gap``: ``max_r (max_j s_rj - m_r)``, the peak gap (arXiv 2511.11062, Eq. 7, there in
      natural log and against the running maximum);
    * ``mass``: ``max_r log2(sum_j 2^(s_rj - L_r))``, the largest share of a row's softmax sum that
      falls into the tile.

    Rounding may raise a score slightly above 0; it counts as 0 then. How a NaN in a row affects its
    tile's score is not defined (the reference returns NaN, kernels the maximum of the other rows),
    because such a result is not used: see :meth:`.Run.end_call`.
    """

    out: Tensor
    lse: Tensor
    score: Tensor | None


class Pooled(NamedTuple):
    """Mean key and mean value of each key tile, ``keys, values [B, H, Tk, D]``, contiguous and in
    the dtype of the keys; ``length`` keys were averaged, ``rows`` to a tile."""

    keys: Tensor
    values: Tensor
    length: int
    rows: int

    @property
    def log_count(self) -> Tensor:
        """Natural log of the number of keys behind each mean, ``[Tk]`` float32."""
        counts = self.keys.new_full((self.keys.shape[2],), self.rows, dtype=torch.float32)
        counts[-1] = self.length - (len(counts) - 1) * self.rows
        return counts.log()


class Skipped(NamedTuple):
    """The tiles that a call left out, and what stands in for them.

    ``q [B, H, Lq, D]``, ``scale`` and ``order`` as in :class:`Inputs`; ``pooled``: the mean of each
    key tile; ``live [B, H, Tq, ceil(Tk/32)]`` int32: bits of the tiles that were not left out.
    """

    q: Tensor
    pooled: Pooled
    scale: float
    live: Tensor
    order: Tensor | None = None


class Agreement(NamedTuple):
    """How well the means of skipped tiles predict what is missing from the output, as sums over the
    audited queries, ``[B, H]`` float32. ``agreement``: the products of what the means would add and
    what is missing; ``power``: the squares of what the means would add. Their ratio is the
    least-squares factor for the means (tail.py)."""

    agreement: Tensor
    power: Tensor


class Backend(Protocol):
    """One way to compute attention tile by tile."""

    name: str
    #: Whether scores are relative to the maximum and the sum of the tiles visited so far, this one
    #: included: never below the score defined above, and 0 for the first tile visited.
    running_scores: bool

    def tile_shape(self, head_dim: int) -> TileShape:
        """Tile sides used for this head_dim; the lists passed to ``forward`` must fit them."""
        ...

    def in_order(
        self, call: Inputs, order: Tensor | None, means: bool
    ) -> tuple[Inputs, Pooled | None]:
        """The call, whose tokens come as the model lists them, in the ``order`` of the tile map
        (None: as they come), and the means of the key tiles where ``means`` asks for them."""
        ...

    def forward(
        self, call: Inputs, lists: TileLists | None = None, criterion: Criterion | None = None
    ) -> Attended:
        """Attention over the tiles in ``lists``. None means all of them, and gives the same bits as
        lists that name all, unless the compiler rounds the two cases differently; ``criterion``
        does not change ``out`` and ``lse`` either, with the same reservation. Every query tile must
        have at least one tile to visit."""
        ...

    def forward_and_audit(
        self, call: Inputs, lists: TileLists, criterion: Criterion | None, audited: range
    ) -> tuple[Attended, Attended]:
        """``forward``, and the query tiles ``audited`` over all tiles: their queries in the order
        of the map."""
        ...

    def add_skipped(self, kept: Attended, skipped: Skipped, factor: Tensor) -> None:
        """Add the skipped tiles' means to a result: see :func:`.pooled.add_skipped`."""
        ...

    def audit_skipped(
        self, kept: Attended, skipped: Skipped, full: Attended, audited: range
    ) -> Agreement:
        """How well those means predict what is missing: see :func:`.pooled.audit_skipped`."""
        ...

    def tile_map(self, device: torch.device) -> TileMap | None:
        """Kernels that keep the tile map on this device, if there are any: see gpu/tile_map.py."""
        ...


class Provider(Protocol):
    """Gives a run its backend: the only one for a device, or the first of several that works."""

    name: str

    def tile_shape(self, head_dim: int) -> TileShape:
        """The tile sides of whichever backend is provided."""
        ...

    def unsupported(self, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        """Why tensors like ``q [B, H, Lq, D]``, ``k, v [B, H, Lk, D]`` can't be computed here, or
        None. Asked at every call: see constraints.py."""
        ...

    def provide(self, device: torch.device, head_dim: int, dtype: torch.dtype) -> Backend | str:
        """The backend for such calls, or why none is trusted with them. Runs a self-test when first
        asked."""
        ...


class TileMap(Protocol):
    """Scores -> next live bits -> lists: kernels of a backend, or ``backends/tile_map.py``.

    Bits ``live [B, H, Tq, ceil(Tk/32)]`` int32 (None: all tiles are live), ``score [B, H, Tq, Tk]``
    float32, log2, ``pinned [Tq, Tk]`` bool. Nothing waits for a device.
    """

    def make_lists(self, live: Tensor, tk: int, alternate: bool = False) -> TileLists:
        """:func:`.tiles.make_lists`."""
        ...

    def next_live(
        self, live: Tensor | None, score: Tensor, limit: float | Limit, pinned: Tensor
    ) -> Tensor:
        """:func:`.tile_map.next_live`."""
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


def some_of(call: Inputs, tiles: range, tile: TileShape) -> Inputs:
    """The same call for the queries of some query tiles, in the order of the map."""
    return Inputs(pick(call.q, rows_of(tiles, tile, call.order)), call.k, call.v, call.scale)


def check_order(order: Tensor, length: int) -> None:
    """Raise ValueError for an order that doesn't fit so many tokens."""
    if order.shape != (length,) or order.dtype != torch.int64:
        raise ValueError(f"order {tuple(order.shape)}, {order.dtype}, for {length} tokens.")


def pick(q: Tensor, rows: Rows) -> Tensor:
    """Some of the queries ``q [B, H, Lq, D]``, in the same memory layout."""
    inside = q.stride(1) < q.stride(2)
    return take(q, rows) if inside and isinstance(rows, Tensor) else q[:, :, rows]


def rows_of(tiles: range, tile: TileShape, order: Tensor | None) -> Rows:
    """The queries of some query tiles; ``order``: see :class:`Inputs`."""
    rows = slice(tiles.start * tile.q, tiles.stop * tile.q)
    return rows if order is None else order[rows]


def empty_out(q: Tensor) -> Tensor:
    """An uninitialised output in the memory layout of the queries ``q [B, H, Lq, D]``.

    So ``out.transpose(1, 2).flatten(2)`` takes no copy where the model keeps ``[B, L, H, D]``.
    """
    b, h, lq, d = q.shape
    if q.stride(1) < q.stride(2):
        return q.new_empty(b, lq, h, d).transpose(1, 2)
    return q.new_empty(b, h, lq, d)
