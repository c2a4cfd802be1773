"""Does content decide where the demo model's attention goes, or would a table of places do?

Takes the share of every row's softmax that falls in each 64 x 64 tile, while different prompts are
drawn, and keeps the same share of tiles by three maps: the video's own, that of another prompt, and
the mean of all other prompts (the best that a table of places can know). Where content decides,
others' maps lose much more than the own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from comfyui_liteattention.token_order import compact_order

from .latents import encode
from .model import LATENT_SHAPE
from .recorder import record_attention
from .sample import SampleConfig, guided_velocity, sample, sigma_schedule
from .text import caption, embed, embed_prompts
from .tile_stats import tile_scores
from .videos import FRAMES, clip_times, draw_scene, render

TILE = 64


@dataclass(frozen=True)
class Losses:
    """Mean share of a row's softmax that is lost when the same share of tiles is kept."""

    own: float  # by the map of this very call
    other: float  # by that of another prompt at the same step
    table: float  # by the mean of all other prompts

    @property
    def ratio(self) -> float:
        return self.other / self.own


@lru_cache(maxsize=2)
def _order(shape: tuple[int, ...]) -> torch.Tensor:
    """Tokens of a latent [C, F, h, w] in compact pieces of a tile each, as LiteAttention does."""
    grid = (shape[1], shape[2] // 2, shape[3] // 2)
    places = np.stack(np.unravel_index(np.arange(np.prod(grid)), grid), axis=1)
    return torch.from_numpy(compact_order(places, (TILE,)))


def _record(model, shape: tuple[int, ...], masses: list[torch.Tensor]):
    """Collects [B, H, Tq, Tk] for every layer that runs: mean share of the rows in each tile."""
    order = _order(shape)
    return record_attention(
        model,
        lambda layer, q, k: masses.append(tile_scores(q[..., order, :], k[..., order, :]).mean),
    )


def maps_of_prompt(model, table, config: SampleConfig, steps: Sequence[int]) -> torch.Tensor:
    """[steps, layers, 2, H, Tq, Tk] at the given steps of a sampled video (cond and uncond)."""
    found: list[list[torch.Tensor]] = []
    masses: list[torch.Tensor] = []

    def on_step(step: int, latent: torch.Tensor) -> None:
        if step - 1 in steps:
            found.append(list(masses))
        masses.clear()

    with _record(model, config.shape, masses):
        sample(model, table, config, on_step)
    if config.steps - 1 in steps:
        found.append(list(masses))
    return torch.stack([torch.stack(step) for step in found])


@torch.no_grad()
def maps_of_scene(model, table, seed: int, level: float = 0.5, steps: int = 20) -> torch.Tensor:
    """[1, layers, 2, H, Tq, Tk] of one call on a noised training video: needs no sampling."""
    generator = torch.Generator().manual_seed(seed)
    scene = draw_scene(1, generator, two_shapes=1.0, named_drift=1.0)
    clean = encode(render(scene, clip_times(FRAMES)))
    noise = torch.randn(clean.shape, generator=generator)
    sigma = sigma_schedule(steps)[round(level * steps)]
    texts = torch.cat([embed(caption(scene), table), embed_prompts([""], table)])
    masses: list[torch.Tensor] = []
    with _record(model, LATENT_SHAPE, masses):
        guided_velocity(model, (1 - sigma) * clean + sigma * noise, sigma, texts, 1.0)
    return torch.stack(masses)[None]


def losses(maps: Sequence[torch.Tensor], share: float = 0.5) -> Losses:
    """Of the maps of two or more prompts, at `share` of the tiles kept; the mean of all prompts.

    The tiles are chosen among all layers, heads and tiles of a step together, those with the most
    mass first, as a budget chooses them.
    """
    stacked = torch.stack(list(maps)).flatten(2)  # [P, steps, everything of a step]
    count = round(share * stacked.shape[-1])

    def lost(by: torch.Tensor, of: torch.Tensor) -> float:
        kept = of.gather(-1, by.topk(count, -1).indices).sum(-1)
        return float((1 - kept / of.sum(-1)).mean())

    prompts = range(len(stacked))
    others = [stacked[[p for p in prompts if p != own]] for own in prompts]
    return Losses(
        own=_mean(lost(stacked[p], stacked[p]) for p in prompts),
        other=_mean(lost(by, stacked[p]) for p in prompts for by in others[p]),
        table=_mean(lost(others[p].mean(0), stacked[p]) for p in prompts),
    )


def _mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)
