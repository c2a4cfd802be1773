"""Holding an error budget: how much more may be skipped now, from what was measured so far.

The score of a tile bounds what its rows lose with it, from above and loosely. The audit measures
what they do lose. Their ratio, learned per layer and stream while the run goes on, turns the
allowed loss into a threshold. Pure functions; tensors stay on their device, nothing waits.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Aim below the budget by this factor: measurements are samples.
MARGIN = 0.8
#: Measured loss over its bound, before anything was measured; counts as PRIOR_WEIGHT measurements.
PRIOR = 0.3
PRIOR_WEIGHT = 1.0
#: Weight of older measurements at each new one.
DECAY = 0.8


def open_ledger(device: torch.device) -> Tensor:
    """What one layer of one stream has spent, ``[4]`` float64: the bound on the mass of all dropped
    tiles, mean over rows; decayed sums of the audited loss and of the bound at those audits; the
    decayed number of audits."""
    return torch.zeros(4, dtype=torch.float64, device=device)


def enter_audit(ledger: Tensor, lost: Tensor) -> Tensor:
    """Note the mean lost mass ``[]`` of the rows audited in this call."""
    bound, measured, expected, audits = ledger
    return torch.stack(
        [bound, measured * DECAY + lost, expected * DECAY + bound, audits * DECAY + 1]
    )


def lost_per_bound(ledger: Tensor, start: float = PRIOR) -> Tensor:
    """True loss over its bound, ``[]``, as far as known; ``start`` before anything was measured."""
    _, measured, expected, audits = ledger
    prior = PRIOR_WEIGHT * expected / audits.clamp(min=1)
    return (measured + start * prior + 1e-12) / (expected + prior + 1e-12 / start)


def allowance(budget: float, ramp: float, position: float) -> float:
    """Lost mass allowed when ``position`` (0..1] of the run is done; its mean over the run is
    ``budget``. Strict at first: errors made early travel furthest."""
    return budget * (ramp + 1) * position**ramp
