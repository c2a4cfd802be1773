"""Holding an error budget: how much more may be skipped now, from what was measured so far.

The score of a tile bounds what its rows lose with it, from above and loosely. The audit measures
what they do lose. Their ratio, learned per layer and stream while the run goes on, turns the
allowed loss into a threshold. Pure functions; tensors stay on their device, nothing waits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: Aim below the budget by this factor: measurements are samples.
MARGIN = 0.8
#: Measured loss over its bound, before anything was measured; counts as PRIOR_WEIGHT measurements.
PRIOR = 0.3
PRIOR_WEIGHT = 1.0
#: Weight of older measurements at each new one.
DECAY = 0.8


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


def enter_dropped(ledger: Ledger, score: Tensor, dropped: Tensor) -> Ledger:
    """Note the tiles ``[B, H, Tq, Tk]`` bool that this call marked."""
    bound = torch.where(dropped, score.exp2(), 0).sum() / score[..., 0].numel()
    return ledger._replace(bound=ledger.bound + bound)
