"""Holding an error budget: how much more may be skipped now, given what was measured so far.

The score of a tile is an upper bound, and a loose one, on what its rows lose when it is skipped.
The audit measures what they really lose. The ratio of the two, learned per layer and stream while
the run goes on, turns the allowed loss into a threshold. How well a budget is held with the values
below: ``benchmarks.budget``, docs/measured.md. Pure functions; tensors stay on their device.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Fraction of the budget that is aimed at, because the loss is known from samples only.
MARGIN = 0.8
#: Ratio of loss to bound assumed before any measurement; it counts as PRIOR_WEIGHT measurements.
PRIOR = 0.3
PRIOR_WEIGHT = 1.0
#: Older measurements are multiplied by this at each new one.
DECAY = 0.8


def open_ledger(device: torch.device) -> Tensor:
    """What one layer of one stream has lost, ``[4]`` float64: the bound on the mass of all dropped
    tiles, averaged over rows; decayed sums of the audited losses and of the bounds at those audits;
    the decayed number of audits."""
    return torch.zeros(4, dtype=torch.float64, device=device)


def enter_audit(ledger: Tensor, lost: Tensor) -> Tensor:
    """Add ``lost []``, the mean lost mass of the rows audited in this call."""
    bound, measured, expected, audits = ledger
    return torch.stack(
        [bound, measured * DECAY + lost, expected * DECAY + bound, audits * DECAY + 1]
    )


def lost_per_bound(ledger: Tensor, start: float = PRIOR) -> Tensor:
    """Estimated ratio of loss to bound, ``[]``; ``start`` before anything was measured."""
    _, measured, expected, audits = ledger
    prior = PRIOR_WEIGHT * expected / audits.clamp(min=1)
    return (measured + start * prior + 1e-12) / (expected + prior + 1e-12 / start)


def allowance(budget: float, ramp: float, position: float) -> float:
    """Lost mass allowed when the fraction ``position`` (0..1] of the run is done; its mean over the
    run is ``budget``. Less at first, because early errors pass through more steps."""
    return budget * (ramp + 1) * position**ramp
