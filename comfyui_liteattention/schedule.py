"""Where in the run a model call happens. Pure functions of the noise schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

#: Shift of the flow schedule assumed where the host doesn't give its own (Wan's at 480p).
ASSUMED_SHIFT = 3.0
#: Number of steps assumed where that is unknown, too.
ASSUMED_STEPS = 20


class Progress(NamedTuple):
    """``step`` counts from 0; ``position`` in (0, 1] is the part of the run done after it."""

    step: int
    position: float


def locate(sigma: float, sigmas: Sequence[float]) -> Progress:
    """Find ``sigma`` in the schedule ``sigmas`` (``steps + 1`` values), which falls, or rises where
    a video is inverted into noise.

    Higher-order samplers also evaluate between two listed sigmas, or twice at one: such a call
    belongs to the step in whose interval it lies, its position interpolated.
    """
    steps = len(sigmas) - 1
    if steps < 1:
        return Progress(0, 1.0)
    if sigmas[0] < sigmas[-1]:
        return locate(-sigma, [-value for value in sigmas])
    # ``sigma`` may have gone through float32, while ``sigmas`` are Python floats.
    slack = 1e-5 * max(abs(sigmas[0]), abs(sigmas[-1]), 1e-6)
    step = max((i for i in range(steps) if sigmas[i] >= sigma - slack), default=0)
    width = sigmas[step] - sigmas[step + 1]
    inside = (sigmas[step] - sigma) / width if width > 0 else 0.0
    return Progress(step, min(1.0, (step + 1 + min(max(inside, 0.0), 1.0)) / steps))


def noise_fractions(sigmas: Sequence[float], flow: bool) -> tuple[float, ...]:
    """Noise levels as the fraction of the latent that is noise, 0..1. Rectified-``flow`` models use
    them as sigma; others add noise of standard deviation sigma to the signal."""
    return tuple(min(s, 1.0) if flow else s / (1 + s) for s in sigmas)


def assumed_levels(steps: int) -> tuple[float, ...]:
    """Noise levels of a run of which only the number of ``steps`` is known, or not even that (0 or
    less): a shifted flow schedule from pure noise to none, ``s t / (1 + (s - 1) t)``."""
    count = steps if steps > 0 else ASSUMED_STEPS
    removed = (step / count for step in range(count + 1))
    return tuple(
        ASSUMED_SHIFT * (1 - part) / (1 + (ASSUMED_SHIFT - 1) * (1 - part)) for part in removed
    )
