"""See the queries and keys of self-attention while a diffusers Wan model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of x [B, N, H, D] with tables [1, N, 1, D] (pairs repeat their angle)."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 0::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def queries_and_keys(
    attention, hidden: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a WanAttention hands to its attention kernel: q, k as [B, H, N, D], rotated."""
    q = attention.norm_q(attention.to_q(hidden)).unflatten(-1, (attention.heads, -1))
    k = attention.norm_k(attention.to_k(hidden)).unflatten(-1, (attention.heads, -1))
    return rotate(q, *rotary).transpose(1, 2), rotate(k, *rotary).transpose(1, 2)


@contextmanager
def record_attention(
    model, callback: Callable[[int, torch.Tensor, torch.Tensor], None]
) -> Iterator[None]:
    """Call `callback(layer, q, k)` at every self-attention, q and k as [B, H, N, D].

    Computes q and k a second time from the layer's input, and so leaves the model's run as it is.
    """

    def watch(layer: int):
        def hook(attention, args):
            hidden, _, _, rotary = args
            callback(layer, *queries_and_keys(attention, hidden, rotary))

        return hook

    handles = [
        block.attn1.register_forward_pre_hook(watch(layer))
        for layer, block in enumerate(model.blocks)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
