"""Videos of the demo model for benchmarks: dense, with LiteAttention, or with another method."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
)
from torch import Tensor

import comfyui_liteattention as lite
from comfyui_liteattention.backends.base import Inputs
from comfyui_liteattention.integrations.diffusers.hooks import TransformerHook
from comfyui_liteattention.integrations.diffusers.routes import register_backend, unregister_backend
from comfyui_liteattention.policy import audited_tiles, lost_mass
from comfyui_liteattention.report.statistics import RunReport
from comfyui_liteattention.settings import Settings
from comfyui_liteattention.tiles import make_lists
from demo.latents import decode
from demo.model import SHIFT, TEXT_TABLE, load_diffusers_model
from demo.text import embed_prompts, load_table

from .rivals import BACKEND, TILE, Rival


class Case(NamedTuple):
    """One video: what it shows, and its noise."""

    prompt: str
    seed: int
    steps: int = 20


class Way(NamedTuple):
    """How a video is sampled: the noise schedule's shift, the strength of guidance, whether by
    UniPC, of second order, instead of Euler, and whether a second transformer of the same weights
    makes the second half of the steps, as the low-noise expert of Wan 2.2 does."""

    shift: float = SHIFT
    guidance: float = 3.0
    unipc: bool = False
    experts: bool = False

    def scheduler(self) -> Any:
        if self.unipc:
            return UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=self.shift
            )
        return FlowMatchEulerDiscreteScheduler(shift=self.shift)


#: Videos on which everything is tuned.
DEVELOPMENT = (
    Case("red circle moving right and blue square moving up", 7),
    Case("white cross moving down-left and yellow circle moving left", 23),
    Case("green triangle moving up", 31),
    Case("cyan square moving left and orange circle moving right", 47),
)
#: Videos that were kept out of all tuning.
HELD_OUT = (
    Case("yellow square moving left", 101),
    Case("blue triangle moving up-right and green circle moving down", 102),
    Case("orange cross moving up", 103),
    Case("red square moving down-right and white triangle moving left", 104),
    Case("cyan circle moving up-left", 105),
)


class Moment(NamedTuple):
    """Where a call of self-attention happens; ``step`` counts from 0."""

    layer: str
    stream: str
    step: int


#: Called as (moment, q, k, v, scale) with ``q, k, v [B, H, L, D]``.
Attend = Callable[[Moment, Tensor, Tensor, Tensor, float], Tensor]


class Sampled(NamedTuple):
    """``video [F, H, W, 3]`` in 0..1. The other fields are about the whole run: share of the tiles
    computed, mean measured lost mass (NaN: not measured), seconds, and LiteAttention's report."""

    video: Tensor
    computed: float
    lost: float
    seconds: float
    report: RunReport | None = None


class DemoVideos:
    """The demo model under diffusers' own pipeline."""

    def __init__(
        self, num_frames: int = 61, height: int = 256, width: int = 256, way: Way = Way()
    ) -> None:
        self._size = {"num_frames": num_frames, "height": height, "width": width}
        self._text = load_table(TEXT_TABLE)
        self._way = way
        pipeline: Any = WanPipeline
        self.pipe = pipeline(None, None, None, way.scheduler(), load_diffusers_model())
        if way.experts:
            self.pipe.register_modules(transformer_2=load_diffusers_model())
        self.pipe.set_progress_bar_config(disable=True)

    def dense(self, case: Case) -> Sampled:
        video, seconds = self._sample(case)
        return Sampled(video, 1.0, 0.0, seconds)

    def lite(self, case: Case, settings: Settings) -> Sampled:
        """With ``settings``, but without ``never_slower``: timings must not affect the video."""
        sampled = self._enabled(case, _choices(settings) | {"never_slower": False})
        assert not math.isnan(sampled.lost)
        return sampled

    def shipped(self, case: Case, preset: str) -> Sampled:
        """With a preset, and everything else as by default."""
        return self._enabled(case, {"preset": preset})

    def _enabled(self, case: Case, choices: dict[str, Any]) -> Sampled:
        with lite.enabled(self.pipe, **choices) as handle:
            video, seconds = self._sample(case)
            report = handle.report()
        assert report is not None
        lost = math.nan if report.lost_mass_mean is None else report.lost_mass_mean
        return Sampled(video, report.computed_fraction, lost, seconds, report)

    def rival(self, case: Case, rival: Rival) -> Sampled:
        tally: list[tuple[float, float]] = []
        calls: Counter[Hashable] = Counter()

        def attend(at: Moment, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            site = at.layer, at.stream
            out, live = rival.attend(site, at.step / case.steps, q, k, v, scale)
            lost = 0.0 if live.all() else _audit(calls[site], q, k, v, scale, live)
            calls[site] += 1
            tally.append((float(live.float().mean()), lost))
            return out

        video, seconds = self.through(attend, case)
        computed, lost = (sum(values) / len(values) for values in zip(*tally, strict=True))
        return Sampled(video, computed, lost, seconds)

    def through(self, attend: Attend, case: Case) -> tuple[Tensor, float]:
        """The video with ``attend`` as its self-attention, and the seconds that it took."""
        with _routed(self.pipe.transformer, attend):
            return self._sample(case)

    def _sample(self, case: Case) -> tuple[Tensor, float]:
        text, empty = embed_prompts([case.prompt, ""], self._text).split(1)
        if self._way.experts:
            self.pipe.register_to_config(boundary_ratio=_middle(self.pipe.scheduler, case.steps))
        started = time.perf_counter()
        latent = self.pipe(
            prompt_embeds=text,
            negative_prompt_embeds=empty,
            **self._size,
            num_inference_steps=case.steps,
            guidance_scale=self._way.guidance,
            generator=torch.Generator().manual_seed(case.seed),
            output_type="latent",
        ).frames
        seconds = time.perf_counter() - started
        return (decode(latent).clamp(-1, 1) + 1)[0].permute(1, 2, 3, 0) / 2, seconds


def _middle(scheduler: Any, steps: int) -> float:
    """The noise level between the two halves of the steps."""
    scheduler.set_timesteps(steps)
    before, after = scheduler.timesteps[steps // 2 - 1 : steps // 2 + 1].tolist()
    return (before + after) / 2 / scheduler.config.num_train_timesteps


@contextmanager
def _routed(transformer: Any, attend: Attend) -> Iterator[None]:
    """Send all self-attention of the transformer to ``attend``."""

    class Call:
        def __init__(self, context: Any) -> None:
            self.context = context

        def attend(self, layer: str, q: Any, k: Any, v: Any, scale: Any, extra: Any) -> Tensor:
            moment = Moment(layer, self.context.name, self.context.step_index)
            return attend(moment, q, k, v, q.shape[-1] ** -0.5 if scale is None else scale)

        def decline(self, reason: str) -> None:
            raise RuntimeError(reason)

        def end(self, seconds: float) -> bool:
            return True

    layers = [f"blocks.{i}.attn1" for i in range(len(transformer.blocks))]
    hook = TransformerHook(
        transformer, layers, ["WanAttnProcessor"], lambda _, context: Call(context), _nothing
    )
    register_backend(hook)
    try:
        yield
    finally:
        hook.remove()
        unregister_backend(hook)


def _audit(call: int, q: Tensor, k: Tensor, v: Tensor, scale: float, live: Tensor) -> float:
    """Mean lost mass of one query tile, another one at each call, as in LiteAttention's audits."""
    tiles = audited_tiles(call, live.shape[2], live.shape[2])
    rows = q[:, :, tiles.start * TILE : tiles.stop * TILE]
    kept = BACKEND.forward(
        Inputs(rows, k, v, scale), make_lists(live[:, :, tiles.start : tiles.stop])
    )
    full = BACKEND.forward(Inputs(rows, k, v, scale))
    return float(lost_mass(kept.lse, full.lse).mean())


def _choices(settings: Settings) -> dict[str, Any]:
    """The arguments of ``enable`` that give these settings."""
    chosen = {f.name: getattr(settings, f.name) for f in fields(settings)}
    goals = {name: chosen.pop(name) for name in ("closeness", "budget", "threshold")}
    goal = next(name for name, value in goals.items() if value is not None)
    return chosen | {goal: goals[goal]}


def _nothing() -> None: ...
