"""Holding an error budget: how much more may be skipped now, from what was measured so far.

The score of a tile bounds what its rows lose with it, from above and loosely. The audit measures
what they do lose. Their ratio, learned per layer and stream while the run goes on, turns the
allowed loss into a threshold. Pure functions; tensors stay on their device, nothing waits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .tiles import PART

#: Aim below the budget by this factor: measurements are samples.
MARGIN = 0.8
#: Measured loss over its bound, before anything was measured; counts as PRIOR_WEIGHT measurements.
PRIOR = 0.3
PRIOR_WEIGHT = 1.0
#: Weight of older measurements at each new one.
DECAY = 0.8
#: A layer whose loss comes to this many times its aim starts over with all tiles.
TOO_MUCH = 1.5
#: Scores are sorted into bins of this width, log2.
BIN = 0.25
BINS = 160
#: One, in fixed point.
UNIT = 1 << 36


class Ledger(NamedTuple):
    """What one layer of one stream has spent, as scalars ``[]`` float32.

    ``bound``: bound on the mass of all dropped tiles, mean over rows; ``measured`` and
    ``expected``: decayed sums of the audited loss and of the bound at those audits; ``audits``:
    their decayed number.
    """

    bound: Tensor
    measured: Tensor
    expected: Tensor
    audits: Tensor


def open_ledger(device: torch.device) -> Ledger:
    return Ledger(*torch.zeros(4, device=device))


def enter_audit(ledger: Ledger, lost: Tensor) -> Ledger:
    """Note the mean lost mass ``[]`` of the rows audited in this call."""
    return Ledger(
        ledger.bound,
        ledger.measured * DECAY + lost,
        ledger.expected * DECAY + ledger.bound,
        ledger.audits * DECAY + 1,
    )


def lost_per_bound(ledger: Ledger, start: float = PRIOR) -> Tensor:
    """True loss over its bound, ``[]``, as far as known; ``start`` before anything was measured."""
    mean_bound = ledger.expected / ledger.audits.clamp(min=1)
    prior = PRIOR_WEIGHT * mean_bound
    return (ledger.measured + start * prior + 1e-12) / (ledger.expected + prior + 1e-12 / start)


def allowance(budget: float, ramp: float, position: float) -> float:
    """Lost mass allowed when ``position`` (0..1] of the run is done; its mean over the run is
    ``budget``. Strict at first: errors made early travel furthest."""
    return budget * (ramp + 1) * position**ramp


def target(budget: float, ramp: float, position: float) -> float:
    """Lost mass aimed at: the allowance with a margin."""
    return MARGIN * allowance(budget, ramp, position)


def room(ledger: Ledger, aim: float, start: float = PRIOR) -> Tensor:
    """How much more bound may be dropped ``[]`` so that the loss comes to ``aim``."""
    return (aim / lost_per_bound(ledger, start) - ledger.bound).clamp(min=0)


def overspent(ledger: Ledger, aim: float, start: float = PRIOR) -> Tensor:
    """Whether so much more than ``aim`` is lost that waiting won't do, ``[]`` bool: what was
    negligible when it was dropped has become important since."""
    return lost_per_bound(ledger, start) * ledger.bound > TOO_MUCH * aim


def threshold_for(score: Tensor, droppable: Tensor, allowed: Tensor) -> Tensor:
    """Score ``[]`` up to which tiles can go so that their bounds, mean over query tiles, sum up to
    at most ``allowed``: the least important tiles of all heads first.

    ``score [B, H, Tq, Tk]`` log2; ``droppable`` of the same shape, bool.
    """
    # Integers add up to the same sum in any order, so that a card repeats its choices to the bit.
    per_bin = torch.zeros(BINS, dtype=torch.int64, device=score.device)
    for part, may_go in zip(
        score.flatten().split(PART), droppable.flatten().split(PART), strict=True
    ):
        bins = (part / BIN).floor().clamp(-BINS, -1).add(BINS).long()
        per_bin.scatter_add_(0, bins, torch.where(may_go, part.exp2() * UNIT, 0).long())
    fits = (per_bin.cumsum(0) <= allowed.double() * (_query_tiles(score) * UNIT)).sum()
    # Everything below the first bin that doesn't fit.
    return torch.nextafter((fits - BINS) * BIN, torch.tensor(-torch.inf, device=score.device))


def enter_dropped(ledger: Ledger, score: Tensor, dropped: Tensor) -> Ledger:
    """Note the tiles ``[B, H, Tq, Tk]`` bool that this call marked."""
    bound = torch.where(dropped, score.exp2(), 0).sum() / _query_tiles(score)
    return ledger._replace(bound=ledger.bound + bound)


def _query_tiles(score: Tensor) -> int:
    """Query tiles of all samples and heads."""
    return score[..., 0].numel()
