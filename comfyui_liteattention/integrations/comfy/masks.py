"""Masks that only hide text padding. Pure tensor code.

Some models pad their text to a fixed length and hide the padding from every query. Attention over
the tokens that are left is the same without a mask, and any kernel can compute that.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...token_order import VideoTokens

Places = slice | Tensor


class Kept(NamedTuple):
    """Which tokens a mask keeps and which it hides, as places in the sequence, and where the video
    lies among the kept ones."""

    tokens: Places
    hidden: Places
    video: VideoTokens

    def join(self, out: Tensor, rest: Tensor) -> Tensor:
        """The outputs ``[B, H, N, D]`` of kept and of hidden tokens, joined to one sequence."""
        b, h, n, d = out.shape
        whole = out.new_empty(b, h, n + rest.shape[2], d)
        whole[:, :, self.tokens], whole[:, :, self.hidden] = out, rest
        return whole


def kept_tokens(
    mask: Tensor, batch: int, length: int, video: VideoTokens, parts: int
) -> list[Kept] | None:
    """What the mask keeps: one entry for the whole batch, or one for each of its ``parts`` equal
    parts. None if the mask does anything but hide keys outside the video from all queries alike.

    Masks may be ``[B or 1, 1, L]`` or ``[B or 1, 1, 1, L]``: bool, True for kept keys; or floats
    to be added to the scores, each 0 or close to the lowest number of its dtype.
    """
    keys = _counting_keys(mask, batch, length)
    if keys is None or not keys[:, video.start : video.stop].all():
        return None
    if (keys == keys[0]).all():
        return [_kept(keys[0], video)]
    chunks = keys.chunk(parts)
    if not all((rows == rows[0]).all() for rows in chunks):
        return None
    return [_kept(rows[0], video) for rows in chunks]


def _counting_keys(mask: Tensor, batch: int, length: int) -> Tensor | None:
    """The keys that a mask keeps, ``[B or 1, L]`` bool; None if it does anything else."""
    if mask.ndim not in (3, 4) or mask.shape[0] not in (1, batch) or mask.shape[-1] != length:
        return None
    if mask.numel() != mask.shape[0] * length:  # it differs between heads or queries
        return None
    keys = mask.reshape(-1, length)
    if keys.dtype == torch.bool:
        return keys
    if not keys.is_floating_point():
        return None
    counts, hides = keys == 0, keys <= torch.finfo(keys.dtype).min / 2
    return counts if (counts | hides).all() else None


def _kept(keys: Tensor, video: VideoTokens) -> Kept:
    shifted = int(keys[: video.start].sum())
    return Kept(_places(keys), _places(~keys), VideoTokens(video.grid, shifted))


def _places(which: Tensor) -> Places:
    """Where ``which [L]`` is true: as a slice if possible, because indexing with one is no copy."""
    places = which.nonzero().flatten()
    if len(places) == 0:
        return slice(0, 0)
    first, last = int(places[0]), int(places[-1])
    return slice(first, last + 1) if last + 1 - first == len(places) else places
