"""Other ways to choose tiles, implemented from their descriptions, for a comparison on equal terms.

Every method gets one self-attention call at a time and computes the tiles that it keeps with the
same backend as LiteAttention, so that only the choice of tiles differs.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from comfyui_liteattention.backends.base import Inputs
from comfyui_liteattention.backends.cpu.backend import CpuBackend
from comfyui_liteattention.backends.merge import merge
from comfyui_liteattention.tiles import make_lists

LOG2E = math.log2(math.e)
BACKEND = CpuBackend()
TILE = BACKEND.tile.q


class Chosen(NamedTuple):
    """``out [B, H, L, D]``, and the tiles ``[B, H, Tq, Tk]`` bool that were computed for it."""

    out: Tensor
    live: Tensor


class Rival(Protocol):
    """One way to choose tiles. State is keyed by ``site``, a (layer, stream) of one run."""

    def attend(
        self, site: Hashable, position: float, q: Tensor, k: Tensor, v: Tensor, scale: float
    ) -> Chosen:
        """``q, k, v [B, H, L, D]``; ``position`` 0..1 is the part of the run before this step."""
        ...


def tile_scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Largest score of every row in every key tile, log2 units, ``[B, H, L, Tk]``."""
    b, h, length, _ = q.shape
    best = torch.full((b, h, length, -(-length // TILE)), -math.inf)
    for sample in range(b):
        for head in range(h):
            s = q[sample, head].float() @ k[sample, head].float().mT
            padded = torch.nn.functional.pad(s, (0, -length % TILE), value=-math.inf)
            best[sample, head] = padded.unflatten(-1, (-1, TILE)).amax(-1) * (scale * LOG2E)
    return best


def over_query_tiles(per_row: Tensor) -> Tensor:
    """``[B, H, L, Tk]`` -> the largest of each query tile's rows, ``[B, H, Tq, Tk]``."""
    padded = torch.nn.functional.pad(per_row, (0, 0, 0, -per_row.shape[2] % TILE), value=-math.inf)
    return padded.unflatten(2, (-1, TILE)).amax(3)


def compute(q: Tensor, k: Tensor, v: Tensor, scale: float, live: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the live tiles: ``out`` and the natural-log ``lse``."""
    result = BACKEND.forward(Inputs(q, k, v, scale), make_lists(live))
    return result.out, result.lse


@dataclass
class UpstreamSemantics:
    """Rule of arXiv 2511.11062 as its authors' kernel has it: the peak gap to the *running*
    maximum, tiles visited from alternating ends, dropped for good, the first visited always kept.
    """

    threshold: float
    _live: dict[Hashable, Tensor] = field(default_factory=dict)
    _backwards: dict[Hashable, bool] = field(default_factory=dict)

    def attend(
        self, site: Hashable, position: float, q: Tensor, k: Tensor, v: Tensor, scale: float
    ) -> Chosen:
        best = tile_scores(q, k, scale)
        live = self._live.get(site)
        if live is None:
            live = torch.ones_like(over_query_tiles(best), dtype=torch.bool)
        out, _ = compute(q, k, v, scale, live)

        backwards = self._backwards.get(site, False)
        rows = live.repeat_interleave(TILE, 2)[:, :, : q.shape[2]]
        seen = best.masked_fill(~rows, -math.inf)
        seen = seen.flip(-1) if backwards else seen
        before = torch.nn.functional.pad(seen.cummax(-1).values[..., :-1], (1, 0), value=-math.inf)
        gap = torch.where(seen > -math.inf, seen - before, -math.inf)
        gap = gap.flip(-1) if backwards else gap
        self._live[site] = live & (over_query_tiles(gap) > self.threshold)
        self._backwards[site] = not backwards
        return Chosen(out, live)


@dataclass
class SolAttention:
    """Sol-Attn (arXiv 2607.24027), which ComfyUI's own block-sparse node uses. Every call chooses
    blocks by pooled keys and queries; a block that is not chosen counts as one pooled term.

    Checked against comfy_kitchen's reference, see :func:`check_sol_attention`.
    """

    tau: float
    dense_start: float = 0.0

    def attend(
        self, site: Hashable, position: float, q: Tensor, k: Tensor, v: Tensor, scale: float
    ) -> Chosen:
        length = q.shape[2]
        if length % TILE:
            raise ValueError(f"{length} tokens are not full blocks of {TILE}")
        log2_scale = scale * LOG2E
        queries, keys = (t.float().unflatten(2, (-1, TILE)).mean(3) for t in (q, k))
        values = v.float().unflatten(2, (-1, TILE)).sum(3)
        centre = keys.mean(2, keepdim=True)
        pooled = (queries @ (keys - centre).mT) * log2_scale  # [B, H, Tq, Tk]
        variance = (queries**2 * (keys - centre).square().mean(2, keepdim=True)).sum(-1)
        routed = pooled > (self.tau * (variance * log2_scale**2 + 1e-6).sqrt()).unsqueeze(-1)
        if position < self.dense_start:
            routed = torch.ones_like(routed)
        blocks = torch.arange(routed.shape[-1])
        routed |= (blocks.unsqueeze(0) - blocks.unsqueeze(1)).abs() <= 1

        out, lse = compute(q, k, v, scale, routed)
        lse = lse - scale * (q.float() @ centre.mT).squeeze(-1)  # keys are centred in the tail, too
        tail = pooled.masked_fill(routed, -math.inf) * math.log(2)
        lse_tail = torch.logsumexp(tail, -1, keepdim=True) + math.log(TILE)
        out_tail = torch.softmax(tail, -1).nan_to_num() @ values / TILE
        lse_tail, out_tail = (t.repeat_interleave(TILE, 2) for t in (lse_tail, out_tail))
        merged, _ = merge(out, lse, out_tail, lse_tail.squeeze(-1))
        return Chosen(merged.to(q.dtype), routed)


@dataclass
class Window:
    """A fixed band around the diagonal, in raster order: the simplest static choice."""

    tiles: int

    def attend(
        self, site: Hashable, position: float, q: Tensor, k: Tensor, v: Tensor, scale: float
    ) -> Chosen:
        count = -(-q.shape[2] // TILE)
        place = torch.arange(count)
        near = (place.unsqueeze(0) - place.unsqueeze(1)).abs() <= self.tiles
        live = near.expand(*q.shape[:2], count, count).contiguous()
        return Chosen(compute(q, k, v, scale, live)[0], live)


@dataclass
class Everything:
    """Every tile, through LiteAttention's backend and in a given dtype, which shows what rounding
    alone changes."""

    dtype: torch.dtype

    def attend(
        self, site: Hashable, position: float, q: Tensor, k: Tensor, v: Tensor, scale: float
    ) -> Chosen:
        count = -(-q.shape[2] // TILE)
        live = torch.ones(*q.shape[:2], count, count, dtype=torch.bool)
        queries, keys, values = (t.to(self.dtype) for t in (q, k, v))
        out, _ = compute(queries, keys, values, scale, live)
        return Chosen(out.to(q.dtype), live)


def check_sol_attention() -> str:
    """Compare our Sol-Attn with comfy_kitchen's eager reference where that is installed."""
    try:
        from comfy_kitchen.backends.eager.sol_attn import sol_attn
    except ImportError:
        return "comfy-kitchen is not installed: Sol-Attn was not checked against it"
    generator = torch.Generator().manual_seed(5)
    q, k, v = torch.randn(3, 1, 2, 512, 128, generator=generator)
    k = k + torch.randn(1, 2, 1, 128, generator=generator)
    q, k = 2 * q + q[:, :, :1], 2 * k + q[:, :, :1]
    ours = SolAttention(tau=0.2).attend("", 1.0, q, k, v, 128**-0.5)
    theirs = sol_attn(*(t.transpose(1, 2) for t in (q, k, v)), tau=0.2).transpose(1, 2)
    error = float((ours.out - theirs).norm() / theirs.norm())
    if not error < 1e-4:
        raise AssertionError(f"our Sol-Attn differs from comfy_kitchen's by {error}")
    return f"Sol-Attn equals comfy_kitchen's eager reference (relative error {error:.1e})"
