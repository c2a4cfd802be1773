"""Closeness: what errors cost in the finished video, and how much each step may lose for it.

A step from the noise level ``level_i`` (a fraction, 1: pure noise) to ``level_i+1`` moves the
latent by its length times what the model says, and so does an error in it. The clean video is the
part 1 - level of the latent, so an error counts for more in it the more noise there still is: by
1 / (1 - level), and by as much again since attention decides then what a video shows, and later its
details. Errors of different steps add up, as it is much the same tiles that are skipped. With
``lost_i`` the lost mass of step i:

    weight_i  = (level_i - level_i+1) / (1 + FLOOR - level_i+1)^2
    error     = sum_i weight_i * lost_i^POWER
    closeness = AT_ONE - 20 log10(error)        [dB of PSNR to the dense video]

The three numbers are from the demo's model (docs/closeness.md says how and how well), over steps,
budgets, ramps, prompts and seeds. Computed tiles fall with the logarithm of the loss, so the
fewest are computed for an error where all steps contribute the same. Pure functions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

#: Keeps the weight finite where all is noise; measured, it levels off there, too.
FLOOR = 0.05
#: The output's error grows less than the mass that is lost: the tail makes up for more of it.
POWER = 0.85
#: dB at an error of 1: makes 4, 8, 20 and 50 steps right on the mean of the development videos.
AT_ONE = 32.0
#: What people should know of it.
CALIBRATION = "as it is on the demo's model; on another one, the Compare node measures it"
#: dB around an expectation in which 35 of 42 held-out videos lay; the others came closer to dense.
#: Seeds differ by so much.
WITHIN = 7.0
#: dB above what is asked for that are aimed at: videos differ by about as much.
ABOVE = 2.0
#: No step loses more: there is nothing left to gain.
MOST_LOST = 0.6
#: From this noise level on a run begins at pure noise; as far from 0, it ends without any.
WHOLE = 0.98
#: Share of the error that a run may make where another one goes before or after it.
SHARE_OF_A_PART = 0.5


class Expected(NamedTuple):
    """Closeness to the dense video of the same seed in dB, and where most videos lie."""

    db: float
    low: float
    high: float


def weights(levels: Sequence[float]) -> tuple[float, ...]:
    """What a loss costs at each step between the noise ``levels`` (one more than steps). They fall,
    or rise where a video is turned back into noise."""
    return tuple(
        abs(before - after) / (1 + FLOOR - after) ** 2 for before, after in pairwise(levels)
    )


def allowed_losses(closeness: float, levels: Sequence[float]) -> tuple[float, ...]:
    """Lost mass to aim at in each step, so that most videos come to ``closeness`` dB.

    The first step of a run is dense. A run that does not begin at pure noise or does not end
    without any has another one before or after it, which may make the other half of the error.
    """
    later = weights(levels)[1:]
    if not later:
        return (0.0,)
    error = 10 ** ((AT_ONE - closeness - ABOVE) / 20)
    if levels[0] < WHOLE or levels[-1] > 1 - WHOLE:
        error *= SHARE_OF_A_PART
    each = _share_out(error, later)
    return (0.0, *(_loss(each, weight) for weight in later))


def expected_closeness(losses: Sequence[float], levels: Sequence[float]) -> Expected | None:
    """What comes of the lost mass of each step; None where nothing was lost: it is the dense video,
    but for rounding."""
    error = sum(weight * lost**POWER for weight, lost in zip(weights(levels), losses, strict=True))
    if error == 0:
        return None
    db = AT_ONE - 20 * math.log10(error)
    return Expected(db, db - WITHIN, db + WITHIN)


def _loss(each: float, weight: float) -> float:
    return min(MOST_LOST, (each / weight) ** (1 / POWER)) if weight > 0 else MOST_LOST


def _share_out(error: float, weights: Sequence[float]) -> float:
    """What each step contributes so that all of them make ``error``: the same, but for steps that
    can't, since no step loses more than ``MOST_LOST``."""
    most = sorted(weight * MOST_LOST**POWER for weight in weights)
    left = error
    for index, largest in enumerate(most):
        each = left / (len(most) - index)
        if each <= largest:
            return each
        left -= largest
    return most[-1]
