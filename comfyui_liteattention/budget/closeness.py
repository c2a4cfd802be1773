"""Closeness: what an error at each step costs in the finished video, and what a step may lose.

A step from the noise level ``level_i`` (a fraction, 1: pure noise) to ``level_i+1`` adds the
model's output times the length of the step to the latent, and an error in the output likewise. The
fraction 1 - level of the latent is clean video, so the same error weighs more in it the more noise
is left: by 1 / (1 - level). It weighs more by that factor once again, because attention decides at
high noise what the video shows and later only its details. Errors of different steps add up rather
than cancel, since mostly the same tiles are skipped. With ``lost_i`` the lost mass of step i:

    weight_i  = (level_i - level_i+1) / (1 + FLOOR - level_i+1)^2
    error     = sum_i weight_i * lost_i^POWER
    closeness = AT_ONE - 20 log10(amplified(guidance) * error)   [dB of PSNR to the dense video]

The model is empirical. Its constants were fitted on the demo's model over steps, budgets, ramps,
prompts and seeds: docs/closeness.md says how, and how well it predicts. The number of computed
tiles falls with the logarithm of the loss, so for a given error the fewest tiles are computed when
all steps contribute equally to it. Pure functions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

#: Keeps the weight finite at pure noise, where the measured sensitivity levels off as well.
FLOOR = 0.05
#: Below 1 because the tail makes up for a larger share of a larger loss.
POWER = 0.85
#: dB at an error of 1. Makes the estimate right on average at 4, 8, 20 and 50 steps (53 videos).
AT_ONE = 32.0
#: The strength of guidance at which AT_ONE was found, and the part of an error that guidance does
#: not multiply, in the same unit: from development videos with guidance of 1, 3 and 6.
GUIDANCE, UNGUIDED = 3.0, 1.5
#: The reservation that belongs beside every closeness shown to a user.
CALIBRATION = "as it is on the demo's model; on another one, the Compare node measures it"
#: Half width in dB of the range that a report gives, since seeds differ by about as much
#: (docs/closeness.md counts the held-out videos within it).
WITHIN = 7.0
#: Margin in dB: a run aims this much above the closeness asked for, since seeds differ.
ABOVE = 2.0
#: No step loses more than this; beyond it there is nothing left to gain.
MOST_LOST = 0.6
#: A run that begins at this noise level or above counts as begun at pure noise; one that ends at
#: 1 - WHOLE or below, as finished. Any other is taken for one of two runs that make a video.
WHOLE = 0.98
#: Share of the allowed error that each of such two runs gets.
SHARE_OF_A_PART = 0.5


class Expected(NamedTuple):
    """Expected closeness to the dense video of the same seed, and the range of most videos, dB."""

    db: float
    low: float
    high: float


def weights(levels: Sequence[float]) -> tuple[float, ...]:
    """The weight of each step's loss; ``levels`` holds one noise level more than there are steps.
    They fall, or rise where a video is inverted into noise."""
    return tuple(
        abs(before - after) / (1 + FLOOR - after) ** 2 for before, after in pairwise(levels)
    )


def strength_of(guidance: object) -> float:
    """The strength of guidance that a host tells; what is no number counts as calibrated."""
    if not isinstance(guidance, int | float) or math.isnan(guidance):
        return GUIDANCE
    return max(float(guidance), 1.0)


def amplified(guidance: float) -> float:
    """How many times an error counts with this strength of guidance (1: none), compared with
    ``GUIDANCE``: it multiplies the difference of two results, and of their errors."""
    return (UNGUIDED + guidance) / (UNGUIDED + GUIDANCE)


def allowed_losses(
    closeness: float, levels: Sequence[float], guidance: float = GUIDANCE
) -> tuple[float, ...]:
    """Lost mass to aim at in each step, so that most videos come to ``closeness`` dB.

    The first step is dense. A run that begins below pure noise, or ends before all noise is gone,
    is taken for one of two that make a video together, and gets half of the allowed error.
    """
    later = weights(levels)[1:]
    if not later:
        return (0.0,)
    error = 10 ** ((AT_ONE - closeness - ABOVE) / 20) / amplified(guidance)
    if levels[0] < WHOLE or levels[-1] > 1 - WHOLE:
        error *= SHARE_OF_A_PART
    each = _share_out(error, later)
    return (0.0, *(_loss(each, weight) for weight in later))


def expected_closeness(
    losses: Sequence[float], levels: Sequence[float], guidance: float = GUIDANCE
) -> Expected | None:
    """The closeness that follows from each step's lost mass. None where nothing was lost: then the
    video is the dense one, up to rounding."""
    error = sum(weight * lost**POWER for weight, lost in zip(weights(levels), losses, strict=True))
    if error == 0:
        return None
    db = AT_ONE - 20 * math.log10(amplified(guidance) * error)
    return Expected(db, db - WITHIN, db + WITHIN)


def _loss(each: float, weight: float) -> float:
    return min(MOST_LOST, (each / weight) ** (1 / POWER)) if weight > 0 else MOST_LOST


def _share_out(error: float, weights: Sequence[float]) -> float:
    """The contribution of each step, so that all together make ``error``: the same for all, except
    for steps that can't contribute as much without losing more than ``MOST_LOST``."""
    most = sorted(weight * MOST_LOST**POWER for weight in weights)
    left = error
    for index, largest in enumerate(most):
        each = left / (len(most) - index)
        if each <= largest:
            return each
        left -= largest
    return most[-1]
