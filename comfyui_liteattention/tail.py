"""The calibrated tail: what skipped tiles still contribute to the result.

A skipped tile of ``n`` keys counts as their mean, ``n`` times over, with the mean of their values:
one key in place of ``n``. That says well where its part of the output points, and less well how
large it is: the mean of exponentials is more than the exponential of the mean, by a factor that
differs from head to head. The audit knows the truth for some rows, so each head gets the factor
that would have predicted its audited rows best.

Kept part ``o`` with log-sum-exp ``L``, pooled part ``t`` with ``M``, factor ``c``:

    out = (o + c w t) / (1 + c w),   w = exp(M - L)

and the full result is ``f = (o + W t') / (1 + W)``, ``W = exp(L_full - L) - 1``, for the true part
``t'`` of the skipped tiles. So ``c`` solves ``c w (t - o) = (1 + W) (f - o)``, by least squares
over the audited rows of a head, older audits fading. Pure tensor code; nothing waits for a device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .backends.base import Attended
from .tiles import PART, TileShape

#: Weight of older audits at each new one.
DECAY = 0.8
#: No head's factor is larger.
LARGEST = 32.0
#: Log of the largest share that a pooled part is taken for while a factor is sought.
LARGEST_LOG_SHARE = 20.0


class Pooled(NamedTuple):
    """Means over each key tile, ``keys, values [B, H, Tk, D]`` in the dtype of the keys, and the
    natural log of its number of keys, ``log_count [Tk]`` float32."""

    keys: Tensor
    values: Tensor
    log_count: Tensor


class Part(NamedTuple):
    """Attention to a part of the keys: ``out [B, H, L, D]`` and natural ``lse [B, H, L]``, both
    float32; the LSE is ``-inf`` and the output 0 where the part is empty."""

    out: Tensor
    lse: Tensor


class Gain(NamedTuple):
    """Decayed sums over audited rows, ``[B, H]`` float32: how far the pooled part agrees with what
    was missing, and its own size. Their ratio is the factor."""

    agreement: Tensor
    power: Tensor

    @property
    def factor(self) -> Tensor:
        """``c [B, H]``; 0 where no audited row had anything skipped."""
        return (self.agreement / self.power.clamp(min=1e-30)).clamp(0, LARGEST)


def pool(k: Tensor, v: Tensor, rows: int) -> Pooled:
    """Means of ``k, v [B, H, Lk, D]`` over tiles of ``rows`` keys; the last one may hold fewer."""
    length = k.shape[2]
    tiles = -(-length // rows)
    counts = torch.full((tiles,), rows, device=k.device, dtype=torch.float32)
    counts[-1] = length - (tiles - 1) * rows

    def mean(x: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(x, (0, 0, 0, tiles * rows - length))
        sums = padded.unflatten(2, (tiles, rows)).sum(3, dtype=torch.float32)
        return (sums / counts[:, None]).to(x.dtype)

    return Pooled(mean(k), mean(v), counts.log())


def skipped_part(q: Tensor, pooled: Pooled, scale: float, live: Tensor, rows: int) -> Part:
    """Attention of ``q [B, H, L, D]`` to the means of the tiles that are not in ``live
    [B, H, ceil(L / rows), Tk]`` bool."""
    kept = live.repeat_interleave(rows, 2)[:, :, : q.shape[2]]
    score = (q @ pooled.keys.mT).float() * scale + pooled.log_count
    score = score.masked_fill(kept, -torch.inf)
    lse = score.logsumexp(-1)
    share = (score - lse.nan_to_num(neginf=0.0).unsqueeze(-1)).exp()
    return Part((share.to(q.dtype) @ pooled.values).float(), lse)


def calibrate(gain: Gain | None, kept: Attended, tail: Part, full: Attended) -> Gain:
    """Enter an audit: the same rows from the live tiles, from the skipped ones' means, in full."""
    share = (tail.lse - kept.lse).clamp(max=LARGEST_LOG_SHARE).exp().unsqueeze(-1)
    missing = (full.lse - kept.lse).clamp(0, LARGEST_LOG_SHARE).exp().unsqueeze(-1)
    pooled = share * (tail.out - kept.out)
    missing = missing * (full.out.float() - kept.out)
    agreement, power = (pooled * missing).sum((2, 3)), pooled.square().sum((2, 3))
    if gain is None:
        return Gain(agreement, power)
    return Gain(gain.agreement * DECAY + agreement, gain.power * DECAY + power)


def add(
    kept: Attended,
    q: Tensor,
    pooled: Pooled,
    scale: float,
    live: Tensor,
    tile: TileShape,
    factor: Tensor,
) -> None:
    """Add the skipped tiles' part to ``kept.out`` in place, ``factor [B, H]`` times.

    Where no tile of a row is skipped the output stays what it is, bit for bit.
    """
    step = max(1, PART // (tile.q * live.shape[-1]))  # query tiles at once
    for b, h in torch.cartesian_prod(*map(torch.arange, live.shape[:2])).tolist():
        head = (slice(b, b + 1), slice(h, h + 1))
        means = Pooled(pooled.keys[head], pooled.values[head], pooled.log_count)
        for start in range(0, live.shape[2], step):
            tiles = slice(start, start + step)
            rows = slice(start * tile.q, (start + step) * tile.q)
            out, lse = kept.out[head][:, :, rows], kept.lse[head][:, :, rows]
            tail = skipped_part(q[head][:, :, rows], means, scale, live[head][:, :, tiles], tile.q)
            weight = torch.sigmoid(tail.lse - lse + factor[head].log().unsqueeze(-1)).unsqueeze(-1)
            out.copy_(torch.where(weight > 0, out + weight * (tail.out - out), out))
