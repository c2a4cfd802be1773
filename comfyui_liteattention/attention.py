"""Skip state by layer and stream, and what one call of attention does with it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple
from zlib import crc32

import torch
from torch import Tensor

from . import policy, tail
from .backends import tile_map as torch_tile_map
from .backends.base import Agreement, Attended, Backend, Inputs, Skipped, TileMap, rows_of
from .budget.allocation import Limit
from .budget.ledger import PRIOR, enter_audit, open_ledger
from .settings import Settings
from .tiles import TileShape
from .token_order import VideoTokens, arrange

#: Number of offsets at which layers begin their audits: in short sequences, where not every call is
#: audited, some layer then is at every step.
TURNS = 64

#: Identifies what has tiles of its own: a conditioning, a context window, a row of a batch, ...
Stream = Hashable


class Part(NamedTuple):
    """What an attention call asks for one stream. ``video`` says which of the tokens are video;
    None: all of them, on an unknown grid."""

    stream: Stream
    inputs: Inputs
    video: VideoTokens | None = None


def split(streams: Sequence[Stream], call: Inputs, video: VideoTokens | None) -> list[Part]:
    """The equal parts of a batch, of a stream each."""
    tensors = (t.chunk(len(streams)) for t in call[:3])
    return [
        Part(stream, call._replace(q=q, k=k, v=v), video)
        for stream, q, k, v in zip(streams, *tensors, strict=True)
    ]


class Tally(NamedTuple):
    """What one call did. Tensors stay on the device, so that counting costs no synchronisation.

    ``computed`` [] int64, or a number where that is known: tiles computed, those of the audit and
    of the tail included; ``total``: tiles of the matrix; ``lost`` [] float32: mean lost mass of
    the audited rows, None where nothing was audited.
    ``bound`` [] float64: what the ledger expected to be lost at most then, None without a budget.
    """

    computed: Tensor | int
    total: int
    lost: Tensor | None
    bound: Tensor | None = None


@dataclass
class LayerState:
    """Skip state of one (layer, stream) of one run.

    ``live [B, H, Tq, ceil(Tk/32)]`` int32, one bit a tile, updated in place; None until a call has
    marked something: such calls are dense. ``pinned [Tq, Tk]`` bool is made once. ``ledger [4]``:
    see budget/ledger.py, None without a budget. ``fit``: see tail.py. ``remaining``:
    those of all layers of the stream by ``name``, see budget/allocation.py; all states of a stream
    have the same one. ``first_turn``: the number by which its audits begin.
    """

    live: Tensor | None = None
    pinned: Tensor | None = None
    ledger: Tensor | None = None
    fit: Agreement | None = None
    calls: int = 0
    first_turn: int = 0
    name: str = ""
    remaining: dict[str, Tensor] = field(default_factory=dict)


class Named(NamedTuple):
    """The state of a layer and stream of so many tokens."""

    layer: str
    stream: str
    tokens: int
    state: LayerState


class States:
    """All skip state of one run, by layer, stream and shape of the queries ``[B, H, L, D]``: layers
    and streams never share any. For one thread at a time."""

    def __init__(self) -> None:
        self._states: dict[tuple[str, Stream, torch.Size], LayerState] = {}
        self._remaining: defaultdict[Hashable, dict[str, Tensor]] = defaultdict(dict)
        self._numbers: dict[str, int] = {}

    def of(self, layer: str, parts: Sequence[Part]) -> tuple[int, list[LayerState]]:
        """The number of a layer, in the order of execution, and the state of each part of a call
        of it."""
        found = []
        for stream, (q, *_), _ in parts:
            key = layer, stream, q.shape
            if key not in self._states:
                remaining = self._remaining[stream, q.shape, q.device]
                turn = crc32(layer.encode()) % TURNS
                self._states[key] = LayerState(first_turn=turn, name=layer, remaining=remaining)
            found.append(self._states[key])
        return self._numbers.setdefault(layer, len(self._numbers)), found

    def named(self) -> list[Named]:
        """All of them, the layers in the order of execution."""
        found = [
            Named(layer, str(stream), shape[2], state)
            for (layer, stream, shape), state in self._states.items()
        ]
        return sorted(found, key=lambda one: self._numbers[one.layer])

    def forget(self) -> None:
        """Drop all state; the layers keep their numbers."""
        self._states.clear()
        self._remaining.clear()


def all_tiles(part: Part, backend: Backend) -> Tally:
    """The tally of a call that computes everything."""
    q, k = part.inputs.q, part.inputs.k
    tq, tk = backend.tile_shape(q.shape[3]).grid(q.shape[2], k.shape[2])
    tiles = q.shape[0] * q.shape[1] * tq * tk
    return Tally(tiles, tiles, None)


def attend(
    state: LayerState,
    backend: Backend,
    call: Inputs,
    settings: Settings,
    position: float,
    video: VideoTokens | None = None,
    aim: float | None = None,
) -> tuple[Tensor, Tally]:
    """Attention over the live tiles, then mark the negligible ones for the next call.

    ``call``: the tokens as the model lists them -> ``out [B, H, Lq, D]``. ``position`` in (0, 1] is
    the part of the run done when this step ends (see :func:`policy.threshold_at`). ``video`` says
    which tokens are video, where queries and keys are the same tokens; only those are skipped.
    ``aim``: lost mass to come to at the next call, measured and held; None: the threshold rules.
    """
    tile = backend.tile_shape(call.q.shape[3])
    order = _order(settings, video, call.q, tile)
    b, h, lq, _ = call.q.shape
    lk = call.k.shape[2]
    tq, tk = tile.grid(lq, lk)
    marks = policy.marks(settings, position)
    tile_map: TileMap = backend.tile_map(call.q.device) or torch_tile_map

    # Scores against a running sum find only what lies behind the peak in visiting order, so every
    # other call visits the other way round, as upstream does.
    alternate = backend.running_scores and state.calls % 2 == 1
    live = state.live
    lists = None if live is None else tile_map.make_lists(live, tk, alternate)
    criterion = settings.criterion if marks else None
    turn = state.first_turn + state.calls
    audited = range(0) if live is None else policy.audited_tiles(turn, tq, settings.audit)
    rows = rows_of(audited, tile, order)
    needed = settings.tail and (bool(audited) or state.fit is not None)
    call, pooled = backend.in_order(call, order, needed)
    full = None
    if audited and lists is not None:
        result, full = backend.forward_and_audit(call, lists, criterion, audited)
    else:
        result = backend.forward(call, lists, criterion)

    lost = bound = None
    computed = b * h * tq * tk if lists is None else lists.count.sum()
    if live is not None:
        if pooled is not None:
            skipped = Skipped(call.q, pooled, call.scale, live, order)
            _add_tail(state, backend, result, skipped, full, audited)
        if full is not None:
            result.out[:, :, rows] = full.out
            lost = policy.lost_mass(result.lse[:, :, rows], full.lse).mean()
            bound = None if state.ledger is None else state.ledger[0]
        extra = len(audited) * tk + (tq * tk // tile.k if state.fit else 0)
        computed = computed + b * h * extra

    if result.score is not None:
        if state.pinned is None:
            state.pinned = _pinned(settings, video, call, tile)
        limit: float | Limit
        if aim is None:
            limit = policy.threshold_at(settings, position, result.score.shape[-1])
        else:
            limit = _limit(state, tile_map, result.score, lost, aim)
        kept = tile_map.next_live(live, result.score, limit, state.pinned)
        state.live = kept if live is None else live.copy_(kept)
    elif lost is not None and state.ledger is not None:
        state.ledger = enter_audit(state.ledger, lost)
    state.calls += 1
    return result.out, Tally(computed, b * h * tq * tk, lost, bound)


def _limit(
    state: LayerState,
    tile_map: TileMap,
    score: Tensor,
    lost: Tensor | None,
    aim: float,
) -> Limit:
    """The score up to which tiles go, so that ``aim`` is lost; ``lost []``: what the audit of this
    call measured."""
    assert state.pinned is not None
    if state.ledger is None:
        state.ledger = open_ledger(score.device)
    others = [remaining for name, remaining in [*state.remaining.items()] if name != state.name]
    limit, state.ledger, state.remaining[state.name] = tile_map.choose(
        tile_map.histogram(state.live, score, state.pinned),
        score[..., 0].numel(),
        state.ledger,
        lost,
        PRIOR,
        others,
        aim,
    )
    return limit


def _order(
    settings: Settings, video: VideoTokens | None, q: Tensor, tile: TileShape
) -> Tensor | None:
    """How to list the tokens, or None: as they come."""
    if video is None or settings.order == "raster":
        return None
    apart = settings.dense_keys + settings.dense_queries
    return arrange(q.shape[2], video, apart, tile, q.device)


def _pinned(
    settings: Settings,
    video: VideoTokens | None,
    call: Inputs,
    tile: TileShape,
) -> Tensor:
    """Tiles that must stay live, ``[Tq, Tk]`` bool, in the order in which tokens are listed."""
    there = call.q.device  # where they are made, so that nothing waits for a copy
    queries = policy.pinned_tokens(settings.dense_queries, video, call.q.shape[2], there)
    keys = policy.pinned_tokens(settings.dense_keys, video, call.k.shape[2], there)
    if call.order is not None:
        queries, keys = queries[call.order], keys[call.order]
    return policy.pinned_tiles(queries, keys, tile)


def _add_tail(
    state: LayerState,
    backend: Backend,
    result: Attended,
    skipped: Skipped,
    full: Attended | None,
    audited: range,
) -> None:
    """Give the result, in place, what the skipped tiles contribute, calibrated by the audited query
    tiles, whose exact result is ``full``."""
    if full is not None:
        agreement = backend.audit_skipped(result, skipped, full, audited)
        state.fit = tail.enter_audit(state.fit, agreement)
    if state.fit is not None:
        backend.add_skipped(result, skipped, tail.factor(state.fit))
