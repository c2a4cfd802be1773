"""Is the demo model worth measuring on? ``python -m benchmarks.demo_model``.

Draws held-out prompts (no clause of them was ever trained on) and says how often colour, shape and
direction come out as asked, by the plain detector of ``demo.detector``; the same for a few numbers
of steps; and how much more of the attention is lost when tiles are chosen by other prompts' maps
than by the own ones (``demo.content``).
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path

from tqdm import tqdm

from demo.content import Losses, losses, maps_of_prompt
from demo.detector import Verdict, held_out_prompts, judge
from demo.latents import decode
from demo.model import TEXT_TABLE, WEIGHTS, load_diffusers_model
from demo.sample import SampleConfig, contact_sheet, sample
from demo.text import load_table

from .record import write_json

FIRST_SEED = 1000
SHARES = (0.25, 0.35, 0.5)  # of the tiles that are kept


def scores(verdicts: list[Verdict]) -> dict[str, float]:
    """Shares of clauses with the right colour, shape and direction, and of prompts all right."""

    def share(marks: list[bool]) -> float:
        return sum(marks) / max(len(marks), 1)

    return {
        "prompts": share([v.all_right for v in verdicts]),
        "colours": share([x for v in verdicts for x in v.colours]),
        "shapes": share([x for v in verdicts for x in v.shapes]),
        "directions": share([x for v in verdicts for x in v.directions]),
        "ground": share([v.ground for v in verdicts if v.ground is not None]),
    }


def draw(model, table, prompts: list[str], steps: int, sheet: Path | None) -> dict[str, float]:
    """Scores of the prompts, each with a seed of its own; ``sheet``: where to put the pictures."""
    verdicts, videos = [], []
    for n, prompt in enumerate(tqdm(prompts, desc=f"{steps} steps", leave=False)):
        config = SampleConfig(prompt=prompt, seed=FIRST_SEED + n, steps=steps)
        video = decode(sample(model, table, config))
        verdicts.append(judge(video[0], prompt))
        videos.append(video)
    if sheet:
        contact_sheet(videos).save(sheet)
    return scores(verdicts)


def content(model, table, prompts: list[str], config: SampleConfig) -> dict[float, Losses]:
    """By share of tiles: what the own and others' maps lose in the second half of a run."""
    steps = range(config.steps // 2, config.steps)
    maps = [
        maps_of_prompt(model, table, replace(config, prompt=p, seed=FIRST_SEED + n), steps)
        for n, p in enumerate(tqdm(prompts, desc="content", leave=False))
    ]
    return {share: losses(maps, share) for share in SHARES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--steps", type=int, nargs="*", default=[20])
    parser.add_argument("--maps", type=int, default=5, help="prompts whose attention is compared")
    parser.add_argument("--sheet", type=Path, help="folder for pictures, one a number of steps")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model, table = load_diffusers_model(args.weights), load_table(TEXT_TABLE)
    prompts = held_out_prompts(args.prompts)
    found = {}
    for steps in args.steps:
        sheet = args.sheet and args.sheet / f"held_out_{steps}_steps.png"
        found[steps] = draw(model, table, prompts, steps, sheet)
        print(f"{steps} steps: " + ", ".join(f"{k} {v:.3f}" for k, v in found[steps].items()))
    lost = {}
    if args.maps > 1:
        lost = content(model, table, held_out_prompts(args.maps, seed=1), SampleConfig(steps=8))
    for share, by in lost.items():
        print(f"lost at {share:.0%} of the tiles: {by}, ratio {by.ratio:.2f}")
    if args.json:
        write_json(
            args.json, scores=found, content={share: asdict(by) for share, by in lost.items()}
        )


if __name__ == "__main__":
    main()
