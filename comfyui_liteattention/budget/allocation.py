"""How the allowed loss is shared out over layers: it goes where it saves the most tiles.

Rate-distortion at equal slope, where the rate is tiles computed and the distortion the bound on
their mass: one limit for all layers of a stream, so that the tiles with the lowest scores go
first, whichever layer has them. It is the highest at which all layers are expected to lose no more
than the aim. A layer chooses when it is called; the others then count with what their last call
left. Pure functions; tensors stay on their device, nothing waits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..tiles import PART
from .ledger import enter_audit, lost_per_bound

#: Scores are sorted into bins, so many per log2.
PER_LOG2 = 4
BINS = 160
#: No layer takes more than this many times what they may lose on average.
LARGEST_SHARE = 1.6
#: A layer whose loss exceeds its allowance this many times starts over with all its tiles.
TOO_MUCH = 1.5


class Limit(NamedTuple):
    """Which tiles go after a call: those whose score, log2, is at most ``score []`` float32. Where
    ``all_back []`` bool, none goes, and those that went come back: the layer starts over."""

    score: Tensor
    all_back: Tensor


class Choice(NamedTuple):
    """What a layer does next. ``ledger [4]``: see ledger.py.

    ``remaining [1 + BINS]`` float64, in expected lost mass, mean over query tiles: what is lost
    with the tiles that the layer skips, then what would be with those that it computes, by their
    scores.
    """

    limit: Limit
    ledger: Tensor
    remaining: Tensor


def histogram(score: Tensor, droppable: Tensor) -> Tensor:
    """Number of the droppable tiles by score, ``[BINS]`` int64; those of all heads together.

    ``score [B, H, Tq, Tk]`` log2; ``droppable`` of the same shape, bool. A score that is not a
    number is never dropped and not counted.
    """
    # Each query tile has bins of its own, so that not all tiles of a card wait for a few of them.
    total = torch.zeros(BINS, dtype=torch.int64, device=score.device)
    step = max(1, PART // max(score.shape[-1], BINS))
    for part, may_go in zip(
        score.flatten(0, -2).split(step), droppable.flatten(0, -2).split(step), strict=True
    ):
        counted = may_go & ~part.isnan()
        places = (part.nan_to_num(nan=0.0) * PER_LOG2).floor().clamp(-BINS, -1).add(BINS).long()
        counts = torch.zeros(len(part), BINS, dtype=torch.int32, device=score.device)
        total += counts.scatter_add_(1, places, counted.int()).sum(0)
    return total


@lru_cache(maxsize=8)
def mass_of_bins(device: torch.device) -> Tensor:
    """Mass that a tile of each bin holds at most, ``[BINS]`` float64: the mean over the bin."""
    lowest = torch.arange(-BINS, 0, dtype=torch.float64, device=device) / PER_LOG2
    return lowest.exp2() * (2 ** (1 / PER_LOG2) - 1) * PER_LOG2 / math.log(2)


def choose(
    counts: Tensor,
    query_tiles: int,
    ledger: Tensor,
    lost: Tensor | None,
    start: float,
    others: Sequence[Tensor],
    aim: float,
) -> Choice:
    """What goes after a call, so that the layers lose at most ``aim`` on average.

    ``counts``: see :func:`histogram`, of ``query_tiles``; ``lost []``: what this call's audit
    measured; ``start``: see :func:`lost_per_bound`; ``others``: what the other
    layers have remaining.
    """
    held = counts * mass_of_bins(counts.device) / query_tiles
    if lost is not None:
        ledger = enter_audit(ledger, lost)
    ratio = lost_per_bound(ledger, start)
    bound = ledger[:1]
    theirs = torch.stack([*others]) if others else held.new_empty(0, 1 + BINS)
    limit = score_limit(torch.cat([ratio * bound, ratio * held]), theirs, aim)
    gone = torch.arange(-BINS, 0, device=held.device).float() / PER_LOG2 <= limit
    bound = bound + torch.where(gone, held, 0).sum()
    remaining = torch.cat([ratio * bound, (ratio * held).masked_fill(gone, 0)])
    fresh = overspent(remaining, theirs, aim)
    remaining[:1].masked_fill_(fresh, 0)
    return Choice(
        Limit(limit, fresh),
        torch.cat([bound.masked_fill(fresh, 0), ledger[1:]]),
        remaining,
    )


def score_limit(own: Tensor, others: Tensor, aim: float) -> Tensor:
    """Score ``[]`` up to which tiles go so that the layers lose at most ``aim`` on average, and
    this one no more than its largest share. ``own [1 + BINS]``, ``others [N, 1 + BINS]``."""
    total = own + others.sum(0)
    # As cumsum, which on a card adds up in another order every time.
    bins = torch.arange(BINS, device=own.device)
    upto = bins <= bins.unsqueeze(1)
    left = torch.stack([total[1:], own[1:]]).unsqueeze(1)
    together, alone = torch.where(upto, left, 0).sum(-1)
    together = together <= (len(others) + 1) * aim - total[0]
    alone = alone <= LARGEST_SHARE * aim - own[0]
    fits = (together & alone).sum()
    # Everything below the first bin that doesn't fit.
    below = torch.full((), -torch.inf, dtype=torch.float32, device=own.device)
    return torch.nextafter((fits - BINS).float() / PER_LOG2, below)


def overspent(own: Tensor, others: Tensor, aim: float) -> Tensor:
    """Whether the layer has to start over with all its tiles, ``[]`` bool: what was negligible when
    it was dropped has become important since, and skipped tiles have no new score. By
    this layer alone, or by all where it is one of those that lose more than the mean."""
    spent = own[0]
    mean = (spent + others[:, 0].sum()) / (len(others) + 1)
    together = (mean > TOO_MUCH * aim) & (spent >= mean)
    return together | (spent > TOO_MUCH * LARGEST_SHARE * aim)
