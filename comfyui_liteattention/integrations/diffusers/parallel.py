"""diffusers: attention when several processes hold a piece of the sequence each.

``Ulysses`` exchanges pieces of the sequence for heads: diffusers' own template does the exchange
and then asks for the attention of all tokens in a few of the heads. ``Ring`` leaves the queries
where they are: diffusers gathers all keys and values in every process and visits them chunk by
chunk. We gather them, too, but visit them in one call, because thresholds and budgets refer to a
tile's share of the whole row's softmax sum, which a single chunk doesn't show.

All communication comes before any decision. So processes may decide differently (each measures its
own heads or rows), and none waits for another that has decided otherwise.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist
from diffusers.models import attention_dispatch
from torch import Tensor

GRADIENTS = "gradients are enabled (training; otherwise use torch.no_grad())"
TEMPLATE = "_templated_context_parallel_attention"


class Attend(Protocol):
    """Attention without any communication: ``q [B, Lq, H, D]``, ``k, v [B, L, H, D]`` ->
    ``[B, Lq, H, D]``. The queries are those of the ``Lq`` tokens from ``first`` on."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, first: int = 0) -> Tensor: ...


def declined(config: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> str | None:
    """Why a call is left to diffusers altogether, or None: the same answer in every process."""
    parallel = config.context_parallel_config
    if torch.is_grad_enabled():
        return GRADIENTS
    if mask is not None:
        return "an attention mask, with context parallelism"
    if not q.shape == k.shape == v.shape:
        return "queries and keys of different shapes, with context parallelism"
    if parallel.ring_degree > 1 and parallel.ulysses_degree > 1:
        return "Ulysses and ring together (use one of them)"
    if parallel.ring_anything:
        return "ring_anything (use ulysses_anything, or ring with a sequence that divides evenly)"
    if parallel.ring_degree == 1 and not hasattr(attention_dispatch, TEMPLATE):
        return "this version of diffusers exchanges the heads in a way that is not known"
    return None


def attend_across(config: Any, q: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
    """Attention of this process's piece ``q, k, v [B, S, H, D]`` to the whole sequence."""
    if config.context_parallel_config.ring_degree > 1:
        return _ring(config.context_parallel_config, q, k, v, attend)

    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return attend(q, k, v)

    template = getattr(attention_dispatch, TEMPLATE)
    return template(q, k, v, forward_op=forward, backward_op=None, _parallel_config=config)


def _ring(parallel: Any, q: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
    keys, values = _gather(torch.stack((k, v)), parallel._ring_mesh.get_group())
    return attend(q, keys, values, first=parallel._ring_local_rank * q.shape[1])


def _gather(mine: Tensor, group: Any) -> Tensor:
    """The pieces ``[2, B, S, H, D]`` of all processes, concatenated: ``[2, B, L, H, D]``."""
    pieces = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(pieces, mine, group=group)
    return torch.cat(pieces, dim=2)
