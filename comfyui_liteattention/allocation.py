"""How the allowed loss is shared out over layers: it goes where it saves the most tiles.

Rate-distortion at equal slope, where the rate is tiles computed and the distortion the bound on
their mass: one threshold for all layers of a stream, so that the tiles with the lowest scores go
first, whichever layer has them. It is as high as the loss expected of all layers allows. A layer
chooses when it is called; the others then count with what their last call left. Pure functions;
tensors stay on their device, nothing waits.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from .tiles import PART

#: Scores are sorted into bins of this width, log2.
BIN = 0.25
BINS = 160
#: One, in fixed point.
UNIT = 1 << 36
#: No layer takes more than this many times what they may lose on average.
LARGEST_SHARE = 1.6
#: Losing this many times what may be lost won't do.
TOO_MUCH = 1.5


class Stock(NamedTuple):
    """One layer, in expected lost mass, mean over query tiles, float64: ``spent []`` is lost with
    what it skips; ``left [BINS]`` would be, with what it computes, by the scores of the tiles."""

    spent: Tensor
    left: Tensor


def bounds(score: Tensor, droppable: Tensor) -> Tensor:
    """Mass that droppable tiles hold at most, ``[BINS]`` float64: by score, mean over query tiles.

    ``score [B, H, Tq, Tk]`` log2; ``droppable`` of the same shape, bool.
    """
    # Integers add up to the same sum in any order, so that a card repeats its choices to the bit.
    # Each query tile has bins of its own, so that not all tiles of a card wait for a few of them.
    total = torch.zeros(BINS, dtype=torch.int64, device=score.device)
    rows, step = score[..., 0].numel(), max(1, PART // max(score.shape[-1], BINS))
    for part, may_go in zip(
        score.flatten(0, -2).split(step), droppable.flatten(0, -2).split(step), strict=True
    ):
        # What is not a number is never dropped; it must not become a number of a bin either.
        part = part.nan_to_num(nan=0.0)
        bins = (part / BIN).floor().clamp(-BINS, -1).add(BINS).long()
        mass = torch.where(may_go, part.exp2() * UNIT, 0).long()
        total += (
            torch.zeros(len(part), BINS, dtype=torch.int64, device=score.device)
            .scatter_add_(1, bins, mass)
            .sum(0)
        )
    return total.double() / (rows * UNIT)


def threshold(own: Stock, others: Iterable[Stock], aim: float) -> Tensor:
    """Score ``[]`` up to which tiles go so that the layers lose at most ``aim`` on average, and
    this one no more than its largest share."""
    stocks = [own, *others]
    spent = torch.stack([stock.spent for stock in stocks]).sum()
    left = torch.stack([stock.left for stock in stocks]).sum(0)
    together = _up_to(left) <= len(stocks) * aim - spent
    alone = _up_to(own.left) <= LARGEST_SHARE * aim - own.spent
    fits = (together & alone).sum()
    # Everything below the first bin that doesn't fit.
    below = torch.full((), -torch.inf, device=own.left.device)
    return torch.nextafter((fits - BINS) * BIN, below)


def overspent(own: Stock, others: Iterable[Stock], aim: float) -> Tensor:
    """Whether so much more is lost that waiting won't do, ``[]`` bool: what was negligible when it
    was dropped has become important since. By this layer alone, or by all where it is one of those
    that lose more than the mean."""
    mean = torch.stack([own.spent, *(stock.spent for stock in others)]).mean()
    together = (mean > TOO_MUCH * aim) & (own.spent >= mean)
    return together | (own.spent > TOO_MUCH * LARGEST_SHARE * aim)


def after(own: Stock, limit: Tensor, spent: Tensor) -> Stock:
    """The layer once the tiles up to ``limit []`` are gone and ``spent []`` is lost."""
    lowest = torch.arange(-BINS, 0, device=own.left.device) * BIN
    return Stock(spent, own.left.masked_fill(lowest <= limit, 0))


def _up_to(left: Tensor) -> Tensor:
    """Sums of the bins up to each, ``[BINS]``. (As ``cumsum``, which on a card adds up in another
    order every time.)"""
    bins = torch.arange(BINS, device=left.device)
    return torch.where(bins <= bins.unsqueeze(1), left, 0).sum(1)
