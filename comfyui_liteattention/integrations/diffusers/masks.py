"""Masks that only cut padding off the end of a sequence. Pure tensor code.

Models with text behind the video pad the text to a fixed length and mask the padding. Attention
over the tokens that are left is the same without a mask, and any kernel can compute that.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Padding(NamedTuple):
    """The mask keeps the first ``kept[b]`` keys of batch row ``b``. ``blind``: the queries after
    them see no key, so that their output is zero; otherwise they see the kept keys as well."""

    kept: tuple[int, ...]
    blind: bool


def tail_padding(mask: Tensor, batch: int, length: int) -> Padding | None:
    """The padding that ``mask`` cuts off; None if it does anything else.

    Masks may be ``[B or 1, 1, 1, L]`` bool, True for kept keys, or ``[B or 1, 1, L, L]`` bool, True
    for kept pairs of tokens.
    """
    rows = mask.shape[0] if mask.dim() == 4 else 0
    if mask.dtype != torch.bool or rows not in (1, batch) or mask.shape[3] != length:
        return None
    if mask.shape[1:3] == (1, 1):
        keys = mask[:, 0, 0]
    elif mask.shape[1:3] == (1, length):
        keys = mask[:, 0].diagonal(dim1=-2, dim2=-1)
    else:
        return None
    counts = keys.sum(-1, keepdim=True)
    ends = torch.equal(keys, torch.arange(length, device=mask.device) < counts)
    kept = tuple(counts.flatten().tolist())
    if not ends or 0 in kept:
        return None
    blind = mask.shape[2] > 1
    if blind and not all(_is_square(mask[i, 0], n) for i, n in enumerate(kept)):
        return None
    return Padding(kept * (batch // rows), blind)


def _is_square(pairs: Tensor, kept: int) -> bool:
    """Whether ``pairs [L, L]`` bool are exactly those among the first ``kept`` tokens."""
    return bool(pairs[:kept, :kept].all()) and int(pairs.sum()) == kept * kept
