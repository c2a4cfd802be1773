"""One layer of one stream: its tile map, and what one call does with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from . import allocation, budget, policy, tail
from .allocation import Stock
from .backends.base import Attended, Backend, forward_and_audit
from .backends.pooled import pool, skipped_part
from .budget import Ledger
from .learning import phase
from .order import Arrangement, VideoTokens, arrange, take
from .settings import Settings
from .tiles import TileLists, TileShape, all_live, make_lists, pack, unpack


class Tally(NamedTuple):
    """What one call did. Tensors stay on the device, so that counting costs no synchronisation.

    ``computed`` [] int64: tiles computed, those of the audit and of the tail included; ``total``:
    tiles of the matrix; ``lost`` [] float32: mean lost mass of the audited rows, None where nothing
    was audited.
    ``bound`` [] float32: what the ledger expected at most then, None where there is no ledger.
    """

    computed: Tensor
    total: int
    lost: Tensor | None
    bound: Tensor | None = None


@dataclass
class LayerState:
    """Skip state of one (layer, stream) of one run.

    ``live [B, H, Tq, ceil(Tk/32)]`` int32, one bit a tile, updated in place; None until a call has
    marked something: such calls are dense. ``pinned [Tq, Tk]`` bool is made once. ``ledger``: see
    budget.py, None where there is none to hold. ``gain``: see tail.py. ``ratios [PHASES]``: what a
    profile knows of this layer, see :func:`learning.learn`. ``stocks``: those of all layers of the
    stream by ``name``, see allocation.py; all states of a stream have the same one.
    """

    live: Tensor | None = None
    pinned: Tensor | None = None
    ledger: Ledger | None = None
    gain: tail.Gain | None = None
    calls: int = 0
    ratios: tuple[float, ...] | None = None
    name: str = ""
    stocks: dict[str, Stock] = field(default_factory=dict)


def attend(
    state: LayerState,
    backend: Backend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    settings: Settings,
    position: float,
    video: VideoTokens | None = None,
) -> tuple[Tensor, Tally]:
    """Attention over the live tiles, then mark the negligible ones for the next call.

    ``q [B, H, Lq, D]``, ``k, v [B, H, Lk, D]`` -> ``out [B, H, Lq, D]``. ``position`` in (0, 1] is
    the part of the run done when this step ends (see :func:`policy.threshold_at`). ``video`` says
    which tokens are video, where queries and keys are the same tokens; only those are skipped.
    """
    tile = backend.tile_shape(q.shape[3])
    arrangement = _arrangement(settings, video, q, tile)
    if arrangement is not None:
        q, k, v = (take(t, arrangement.order) for t in (q, k, v))
    b, h, lq, _ = q.shape
    tq, tk = tile.grid(lq, k.shape[2])
    marks = policy.marks(settings, position)

    live = None if state.live is None else unpack(state.live, tk)
    # Scores against a running sum find only what lies behind the peak in visiting order, so every
    # other call visits the other way round, as upstream does.
    alternate = backend.running_scores and state.calls % 2 == 1
    lists = None if live is None else _lists(state, backend, live, alternate)
    criterion = settings.criterion if marks else None
    audited = range(0) if live is None else policy.audited_tiles(state.calls, tq, settings.audit)
    full = None
    if audited:
        rows = slice(audited.start * tile.q, audited.stop * tile.q)
        result, full = forward_and_audit(backend, q, k, v, scale, lists, criterion, rows)
    else:
        result = backend.forward(q, k, v, scale, lists, criterion)

    lost = None
    computed = torch.tensor(b * h * tq * tk, device="cpu") if lists is None else lists.count.sum()
    if live is not None:
        lost = _complete(state, backend, result, full, q, k, v, scale, live, audited, settings)
        extra = len(audited) * tk + (tq * tk // tile.k if state.gain else 0)
        computed = computed + b * h * extra

    bound = None
    if lost is not None and state.ledger is not None:
        bound = state.ledger.bound
        state.ledger = budget.enter_audit(state.ledger, lost)
    if result.score is not None:
        if state.pinned is None:
            state.pinned = _pinned(settings, video, lq, k.shape[2], tile, arrangement).to(q.device)
        kept = _mark(state, backend, live, result.score, settings, position)
        state.live = kept if state.live is None else state.live.copy_(kept)
    state.calls += 1
    out = result.out if arrangement is None else take(result.out, arrangement.place)
    return out, Tally(computed, b * h * tq * tk, lost, bound)


def _lists(state: LayerState, backend: Backend, live: Tensor, alternate: bool) -> TileLists:
    """Lists of the live tiles; ``live [B, H, Tq, Tk]`` bool is what the bits in the state say."""
    kernels = backend.tile_map(live.device)
    if kernels is None or state.live is None:
        return make_lists(live, alternate)
    return kernels.make_lists(state.live, live.shape[-1], alternate)


def _mark(
    state: LayerState,
    backend: Backend,
    live: Tensor | None,
    score: Tensor,
    settings: Settings,
    position: float,
) -> Tensor:
    """The tiles to compute at the next call, bits ``[B, H, Tq, ceil(Tk/32)]`` int32."""
    assert state.pinned is not None
    if settings.budget is None:
        threshold = policy.threshold_at(settings, position, score.shape[-1])
        return _next_live(state, backend, live, score, threshold)
    aim = budget.target(settings.budget, settings.ramp, position)
    ledger = state.ledger or budget.open_ledger(score.device)
    start = state.ratios[phase(position)] if state.ratios else budget.PRIOR
    ratio = budget.lost_per_bound(ledger, start).double()
    before = torch.ones_like(score, dtype=torch.bool) if live is None else live
    own = Stock(ratio * ledger.bound, ratio * allocation.bounds(score, before & ~state.pinned))
    others = [stock for name, stock in [*state.stocks.items()] if name != state.name]
    limit = allocation.threshold(own, others, aim)
    kept = _next_live(state, backend, live, score, limit)
    ledger = budget.enter_dropped(ledger, score, before & ~unpack(kept, score.shape[-1]))
    own = allocation.after(own, limit, ratio * ledger.bound)
    fresh = allocation.overspent(own, others, aim)
    state.ledger = ledger._replace(bound=ledger.bound.masked_fill(fresh, 0))
    state.stocks[state.name] = own._replace(spent=own.spent.masked_fill(fresh, 0))
    return torch.where(fresh, all_live(1, 1, 1, score.shape[-1], score.device), kept)


def _next_live(
    state: LayerState,
    backend: Backend,
    live: Tensor | None,
    score: Tensor,
    threshold: float | Tensor,
) -> Tensor:
    """Bits of :func:`policy.next_live`."""
    assert state.pinned is not None
    kernels = backend.tile_map(score.device)
    if kernels is None:
        return pack(policy.next_live(live, score, threshold, state.pinned))
    return kernels.next_live(state.live, score, threshold, state.pinned)


def _arrangement(
    settings: Settings, video: VideoTokens | None, q: Tensor, tile: TileShape
) -> Arrangement | None:
    """How to list the tokens, or None: as they come."""
    if video is None or settings.order == "raster":
        return None
    apart = settings.dense_keys + settings.dense_queries
    return arrange(q.shape[2], video, apart, tile, q.device)


def _pinned(
    settings: Settings,
    video: VideoTokens | None,
    lq: int,
    lk: int,
    tile: TileShape,
    arrangement: Arrangement | None,
) -> Tensor:
    """Tiles that must stay live, ``[Tq, Tk]`` bool, in the order in which tokens are listed."""
    queries = policy.pinned_tokens(settings.dense_queries, video, lq)
    keys = policy.pinned_tokens(settings.dense_keys, video, lk)
    if arrangement is not None:
        order = arrangement.order.cpu()
        queries, keys = queries[order], keys[order]
    return policy.pinned_tiles(queries, keys, tile)


def _complete(
    state: LayerState,
    backend: Backend,
    result: Attended,
    full: Attended | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    live: Tensor,
    audited: range,
    settings: Settings,
) -> Tensor | None:
    """Give the result, in place, what the skipped tiles contribute, and the audited rows their
    exact output, ``full``. Returns the mean lost mass of these, None where there are none."""
    tile = backend.tile_shape(q.shape[3])
    rows = slice(audited.start * tile.q, audited.stop * tile.q)
    if settings.tail:
        pooled = pool(k, v, tile.k)
        if full is not None:
            kept = Attended(result.out[:, :, rows].float(), result.lse[:, :, rows], None)
            some = live[:, :, audited.start : audited.stop]
            part = skipped_part(q[:, :, rows], pooled, scale, some, tile.q)
            state.gain = tail.calibrate(state.gain, kept, part, full)
        if state.gain is not None:
            assert state.live is not None
            backend.add_skipped(result, q, pooled, scale, state.live, state.gain.factor)
    if full is None:
        return None
    result.out[:, :, rows] = full.out
    return policy.lost_mass(result.lse[:, :, rows], full.lse).mean()
