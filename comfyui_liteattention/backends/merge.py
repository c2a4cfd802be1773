"""Attention to two chunks of the keys -> attention to both. Pure tensor code.

For attention that visits the keys chunk by chunk (such as ring attention): each chunk's output is
normalised over the chunk, and its log-sum-exp gives the chunk's weight in the whole.
"""

from __future__ import annotations

import torch
from torch import Tensor


def merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """The output ``[B, H, L, D]`` and LSE ``[B, H, L]`` (natural log) over the keys of both chunks.

    Both are float32 or wider, so that merging many chunks doesn't round many times. An LSE of
    ``-inf`` says that a row saw no key of a chunk: the chunk's output is ignored there, and the
    result is 0 for a row that saw no key of either.
    """
    wide = torch.promote_types(torch.promote_types(out.dtype, lse.dtype), torch.float32)
    lse, other_lse = lse.to(wide), other_lse.to(wide)
    total = torch.logaddexp(lse, other_lse)
    return _share(out.to(wide), lse, total) + _share(other.to(wide), other_lse, total), total


def _share(out: Tensor, lse: Tensor, total: Tensor) -> Tensor:
    """What a chunk contributes: ``out`` times its share of the softmax sum."""
    # Not ``~(lse > -inf)``: a row whose LSE is NaN has to stay NaN and not become zeros.
    unseen = (lse == -torch.inf).unsqueeze(-1)
    return torch.where(unseen, 0, out * (lse - total).exp().unsqueeze(-1))
