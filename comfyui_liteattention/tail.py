"""The calibrated tail: how much of what skipped tiles contribute as means is believed.

The mean key of a tile says well where its part of the output points, and less well how large it
is: the mean of exponentials is more than the exponential of the mean, by a factor that differs from
head to head. The audit knows the truth for some rows, so each head gets the factor that would have
predicted its audited rows best.

Kept part ``o`` with log-sum-exp ``L``, pooled part ``t`` with ``M``, factor ``c``:

    out = (o + c w t) / (1 + c w),   w = exp(M - L)

and the full result is ``f = (o + W t') / (1 + W)``, ``W = exp(L_full - L) - 1``, for the true part
``t'`` of the skipped tiles. So ``c`` solves ``c w (t - o) = (1 + W) (f - o)``, by least squares
over the audited rows of a head, older audits fading. Pure functions; nothing waits for a device.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .backends.base import Attended
from .backends.pooled import Part

#: Weight of older audits at each new one.
DECAY = 0.8
#: No head's factor is larger.
LARGEST = 32.0
#: Log of the largest share that a part is taken for while a factor is sought.
LARGEST_LOG_SHARE = 20.0


class Gain(NamedTuple):
    """Decayed sums over audited rows, ``[B, H]`` float32: how far the pooled part agrees with what
    was missing, and its own size. Their ratio is the factor."""

    agreement: Tensor
    power: Tensor

    @property
    def factor(self) -> Tensor:
        """``c [B, H]``; 0 where no audited row had anything skipped."""
        return (self.agreement / self.power.clamp(min=1e-30)).clamp(0, LARGEST)


def calibrate(gain: Gain | None, kept: Attended, part: Part, full: Attended) -> Gain:
    """Enter an audit: the same rows from the live tiles, from the skipped ones' means, in full."""
    share = (part.lse - kept.lse).clamp(max=LARGEST_LOG_SHARE).exp().unsqueeze(-1)
    growth = (full.lse - kept.lse).clamp(0, LARGEST_LOG_SHARE).exp().unsqueeze(-1)
    pooled = share * (part.out - kept.out)
    missing = growth * (full.out.float() - kept.out)
    agreement, power = (pooled * missing).sum((2, 3)), pooled.square().sum((2, 3))
    if gain is None:
        return Gain(agreement, power)
    return Gain(gain.agreement * DECAY + agreement, gain.power * DECAY + power)
