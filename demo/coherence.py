"""How much of the demo model's attention could be skipped, and for how long it stays so.

`python -m demo.coherence` samples one dense video of 4096 tokens with guidance and prints, for
several thresholds, the share of negligible 64 x 64 tiles and the share of those that are still
negligible one step later: for the shipped weights, for the untrained start of the training run
and for plain random weights.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch

from .model import TEXT_TABLE, WEIGHTS, build_model, load_diffusers_model, sharpen_start
from .recorder import record_attention
from .sample import SampleConfig, guided_velocity, sample, sigma_schedule
from .text import caption, embed, embed_prompts, load_table
from .tile_stats import TileScores, negligible, persistence, tile_scores

GAPS = (-5.0, -10.0)  # log2 units
MASSES = (0.001, 0.003, 0.01)  # share of a row's softmax
RULES = tuple({"gap": gap} for gap in GAPS) + tuple({"mass": mass} for mass in MASSES)

Step = list[TileScores]  # one entry per layer


@dataclass(frozen=True)
class Coherence:
    """One threshold over a run. Shares are averages over layers, heads, cond and uncond."""

    rule: str
    first: float  # negligible share at the first step
    middle: float  # and at the middle step
    last: float  # and at the last step
    mean: float
    persist_middle: float  # share of the middle step's that are negligible at the next one
    persist_worst: float  # the smallest such share of all steps
    layers: tuple[float, ...]  # negligible share at the middle step, per layer and head


def record_steps(
    model, table: dict[str, torch.Tensor], config: SampleConfig, tile: int = 64
) -> list[Step]:
    """Sample densely with guidance; tile scores [2, H, Tq, Tk] per step and layer."""
    steps: list[Step] = []

    def on_attention(layer: int, q: torch.Tensor, k: torch.Tensor) -> None:
        steps[-1].append(tile_scores(q, k, tile))

    with record_attention(model, on_attention):
        sample(model, table, config, on_step=lambda step, latent: steps.append([]))
    return steps


@torch.no_grad()
def record_middle(
    model, table: dict[str, torch.Tensor], config: SampleConfig, tile: int = 64
) -> list[Step]:
    """The two steps around the middle of a run, entered from a noised training video.

    A shortcut for tests: 2 model calls in place of a whole run.
    """
    from .latents import encode
    from .videos import draw_scene, render

    generator = torch.Generator().manual_seed(config.seed)
    _, frames, height, width = config.shape
    scene = draw_scene(1, 2 * height, 2 * width, generator, two_shapes=1.0)
    clean = encode(render(scene, frames, 2 * height, 2 * width))
    noise = torch.randn(clean.shape, generator=generator)
    texts = torch.cat([embed(caption(scene), table), embed_prompts([""], table)])
    sigmas = sigma_schedule(config.steps, config.shift)
    middle = config.steps // 2
    latent = (1 - sigmas[middle]) * clean + sigmas[middle] * noise
    steps: list[Step] = []
    with record_attention(model, lambda layer, q, k: steps[-1].append(tile_scores(q, k, tile))):
        for step in (middle, middle + 1):
            steps.append([])
            velocity = guided_velocity(model, latent, sigmas[step], texts, config.guidance)
            latent = latent + (sigmas[step + 1] - sigmas[step]) * velocity
    return steps


def share(marks: Iterable[torch.Tensor]) -> float:
    """Share of True over all layers."""
    return float(torch.stack([mark.float().mean() for mark in marks]).mean())


def summarise(steps: list[Step], rule: dict[str, float]) -> Coherence:
    """Statistics of one threshold over the recorded steps (the middle is len(steps) // 2 ...

    ... but never the last, so that there is a next step to compare with).
    """
    marks = [torch.stack([negligible(scores, **rule) for scores in step]) for step in steps]
    shares = [share(mark) for mark in marks]
    stays = [persistence(now, later) for now, later in pairwise(marks)]
    middle = min(len(steps) // 2, len(steps) - 2)
    known = [stay for stay in stays if not math.isnan(stay)]
    (name, value), *_ = rule.items()
    per_head = marks[middle].float().mean((1, 3, 4)).flatten()
    return Coherence(
        rule=f"{name} <= {value:g}" if name == "gap" else f"{name} < {value:g}",
        first=shares[0],
        middle=shares[middle],
        last=shares[-1],
        mean=sum(shares) / len(shares),
        persist_middle=stays[middle],
        persist_worst=min(known, default=math.nan),
        layers=tuple(round(float(x), 3) for x in per_head),
    )


def random_model(seed: int = 1, gain: float = 1.0, locality: float = 0.0):
    """An untrained model; with the training run's gain and locality, its starting point."""
    model = build_model(seed)
    sharpen_start(model, gain, locality)
    return model.eval().requires_grad_(False)


def format_table(name: str, rows: list[Coherence]) -> str:
    """Rows as fixed-width text."""
    heads = ("first", "middle", "last", "mean", "stays", "worst")
    titles = "".join(f"{head:>8}" for head in heads)
    lines = [name, f"  {'rule':<14}{titles}   middle, per layer and head"]
    for row in rows:
        numbers = (row.first, row.middle, row.last, row.mean, row.persist_middle, row.persist_worst)
        cells = "".join(f"{'-':>8}" if math.isnan(x) else f"{x:8.3f}" for x in numbers)
        per_head = " ".join(f"{x:.2f}" for x in row.layers)
        lines.append(f"  {row.rule:<14}{cells}   {per_head}")
    return "\n".join(lines)


def main() -> None:
    from .train import TrainConfig

    parser = argparse.ArgumentParser(description="Negligible 64 x 64 tiles of the demo model.")
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--prompt", default=SampleConfig.prompt)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--only-trained", action="store_true", help="leave the controls out")
    args = parser.parse_args()
    table = load_table(TEXT_TABLE)
    config = SampleConfig(prompt=args.prompt, seed=args.seed, steps=args.steps)
    training = TrainConfig()
    models = {"trained (shipped weights)": lambda: load_diffusers_model(args.weights)}
    if not args.only_trained:
        models |= {
            f"start of training (untrained, gain {training.gain:g}, locality "
            f"{training.locality:g})": lambda: random_model(
                training.seed, training.gain, training.locality
            ),
            "random weights": random_model,
            "random weights, gain 2": lambda: random_model(gain=2.0),
        }
    figures = {}
    for name, make in models.items():
        steps = record_steps(make(), table, config)
        rows = [summarise(steps, rule) for rule in RULES]
        figures[name] = [asdict(row) for row in rows]
        print(format_table(name, rows), flush=True)
    if args.json:
        args.json.write_text(json.dumps({"config": asdict(config), "models": figures}, indent=1))


if __name__ == "__main__":
    main()
