"""One layer of one stream: its tile map, and what one call does with it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import policy
from .backends.base import Attended, Backend
from .settings import Settings
from .tiles import make_lists, pack, unpack


class Tally(NamedTuple):
    """What one call did. Tensors stay on the device, so that counting costs no synchronisation.

    ``computed`` [] int64: tiles computed, the audit's included; ``total``: tiles of the matrix;
    ``lost`` [] float32: mean lost mass of the audited rows, None where nothing was audited.
    """

    computed: Tensor
    total: int
    lost: Tensor | None


@dataclass
class LayerState:
    """Skip state of one (layer, stream) of one run.

    ``live [B, H, Tq, ceil(Tk/32)]`` int32, one bit a tile, updated in place; None until a call has
    marked something: such calls are dense. ``pinned [Tq, Tk]`` bool is made once.
    """

    live: Tensor | None = None
    pinned: Tensor | None = None
    calls: int = 0


def attend(
    state: LayerState,
    backend: Backend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    settings: Settings,
    position: float,
) -> tuple[Tensor, Tally]:
    """Attention over the live tiles, then mark the negligible ones for the next call.

    ``q [B, H, Lq, D]``, ``k, v [B, H, Lk, D]`` -> ``out [B, H, Lq, D]``. ``position`` in (0, 1] is
    the part of the run done when this step ends (see :func:`policy.threshold_at`).
    """
    b, h, lq, head_dim = q.shape
    tile = backend.tile_shape(head_dim)
    tq, tk = tile.grid(lq, k.shape[2])
    threshold = policy.threshold_at(settings, position, tk)
    criterion = settings.criterion if threshold > -math.inf else None

    live = None if state.live is None else unpack(state.live, tk)
    # Scores against a running sum find only what lies behind the peak in visiting order, so every
    # other call visits the other way round, as upstream does.
    alternate = backend.running_scores and state.calls % 2 == 1
    lists = None if live is None else make_lists(live, alternate)
    result = backend.forward(q, k, v, scale, lists, criterion)

    lost = None
    computed = torch.tensor(b * h * tq * tk) if lists is None else lists.count.sum()
    audited = policy.audited_tiles(state.calls, tq, settings.audit)
    if lists is not None and audited:
        rows = slice(audited.start * tile.q, audited.stop * tile.q)
        lost = _audit(result, rows, backend, q, k, v, scale)
        computed = computed + b * h * len(audited) * tk

    if result.score is not None:
        if state.pinned is None:
            state.pinned = policy.pinned_tiles(settings, lq, k.shape[2], tile).to(q.device)
        kept = policy.next_live(live, result.score, threshold, state.pinned)
        state.live = pack(kept) if state.live is None else state.live.copy_(pack(kept))
    state.calls += 1
    return result.out, Tally(computed, b * h * tq * tk, lost)


def _audit(
    result: Attended, rows: slice, backend: Backend, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> Tensor:
    """Compute some query rows in full: their mean lost mass, and their exact output in place."""
    full = backend.forward(q[:, :, rows], k, v, scale)
    result.out[:, :, rows] = full.out
    return policy.lost_mass(result.lse[:, :, rows], full.lse).mean()
