"""Why an attention call stays dense: a reason a user can read, or None."""

from __future__ import annotations

from torch import Tensor

from .backends.base import Provider
from .settings import Settings

CROSS_ATTENTION = "cross-attention (queries and keys have different lengths)"


def dense_reason(
    q: Tensor, k: Tensor, v: Tensor, streams: int, settings: Settings, backend: Provider
) -> str | None:
    """Reason for ``q, k, v [B, H, L, D]`` of ``streams`` equal batch parts, or None to go ahead."""
    if q.shape[2] != k.shape[2]:
        return CROSS_ATTENTION
    if q.shape != k.shape or k.shape != v.shape:
        return "grouped or uneven heads (q, k and v have different shapes)"
    if q.shape[2] < settings.min_tokens:
        return f"short sequence (fewer than {settings.min_tokens} tokens)"
    if q.shape[0] % streams:
        return f"a batch of {q.shape[0]} can't be split into {streams} conditionings"
    return backend.unsupported(q, k, v)
