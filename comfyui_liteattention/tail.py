"""The calibrated tail: how much weight the means that stand in for skipped tiles are given.

A tile's mean key predicts the direction of its contribution to the output well, and its size less
well: the mean of exponentials is more than the exponential of the mean (Jensen's inequality), by a
factor that differs from head to head. The audit knows the exact result for some rows, so each head
gets the factor that would have predicted its audited rows best.

Kept part ``o`` with log-sum-exp ``L``, pooled part ``t`` with ``M``, factor ``c``:

    out = (o + c w t) / (1 + c w),   w = exp(M - L)

and the full result is ``f = (o + W t') / (1 + W)``, ``W = exp(L_full - L) - 1``, for the true part
``t'`` of the skipped tiles. So ``c`` solves ``c w (t - o) = (1 + W) (f - o)``, by least squares
over the audited rows of a head (``pooled.compare``), with older audits weighted down. What the tail
is worth: docs/measured.md ("skipped tiles contribute nothing") and ``benchmarks.ablation`` (one
factor for all heads). Pure functions; nothing waits for a device.
"""

from __future__ import annotations

from torch import Tensor

from .backends.base import Agreement

#: Older audits are multiplied by this at each new one.
DECAY = 0.8
#: Upper limit of a head's factor.
LARGEST = 32.0


def enter_audit(fit: Agreement | None, now: Agreement) -> Agreement:
    """Add an audit to the sums over the older ones."""
    if fit is None:
        return now
    return Agreement(
        now.agreement.add(fit.agreement, alpha=DECAY), now.power.add(fit.power, alpha=DECAY)
    )


def factor(fit: Agreement) -> Tensor:
    """``c [B, H]``; 0 where no audited row had anything skipped."""
    return (fit.agreement / fit.power.clamp(min=1e-30)).clamp(0, LARGEST)
