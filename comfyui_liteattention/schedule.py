"""Where in the run a model call happens. Pure functions of the noise schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Progress(NamedTuple):
    """``step`` counts from 0; ``position`` in (0, 1] is the part of the run done after it."""

    step: int
    position: float


def locate(sigma: float, sigmas: Sequence[float]) -> Progress:
    """Find ``sigma`` in the schedule ``sigmas`` (``steps + 1`` values), which falls, or rises where
    a video is turned back into noise.

    Samplers of higher order also evaluate between two listed sigmas, or twice at one: such a call
    belongs to the step in whose interval it lies, with the position in proportion.
    """
    steps = len(sigmas) - 1
    if steps < 1:
        return Progress(0, 1.0)
    if sigmas[0] < sigmas[-1]:
        return locate(-sigma, [-value for value in sigmas])
    # Sigmas come as float32 from one side and as Python floats from the other.
    slack = 1e-5 * max(abs(sigmas[0]), abs(sigmas[-1]), 1e-6)
    step = max((i for i in range(steps) if sigmas[i] >= sigma - slack), default=0)
    width = sigmas[step] - sigmas[step + 1]
    inside = (sigmas[step] - sigma) / width if width > 0 else 0.0
    return Progress(step, min(1.0, (step + 1 + min(max(inside, 0.0), 1.0)) / steps))
