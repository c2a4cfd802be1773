"""How much does an error at one step matter? ``python -m benchmarks.sensitivity``.

The least important tiles are left out at one step only, all other steps are dense, and the video is
compared with the dense one. The sensitivity of a step is the mean square error of the video divided
by the square of the lost mass. docs/closeness.md compares a measure like it with the weights that
closeness gives to steps. For the ramp of a budget it means this: if squared errors add up, and the
number of computed tiles falls with the logarithm of the loss, the error for a given number of tiles
is least when the loss of a step is proportional to its sensitivity to the power -1/2.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm

from benchmarks.demo_video import DEVELOPMENT, Case, DemoVideos, Moment
from benchmarks.record import write_json
from comfyui_liteattention.backends.base import Inputs
from comfyui_liteattention.backends.cpu.backend import CpuBackend
from comfyui_liteattention.policy import lost_mass
from comfyui_liteattention.tiles import make_lists
from demo.model import SHIFT

STEPS = (0, 1, 2, 4, 7, 10, 14, 19)
#: The bound on the mass of the tiles left out, averaged over query tiles; about a third of it is
#: really lost.
LEFT_OUT = 0.06


def noise_levels(steps: int) -> list[float]:
    """The noise levels of the demo's schedule, one more than ``steps``."""
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    scheduler.set_timesteps(steps)
    levels: list[float] = scheduler.sigmas.tolist()
    return levels


class OneStep:
    """Dense attention, except at one step."""

    def __init__(self, step: int) -> None:
        self._step = step
        self._backend = CpuBackend()
        self._lost: list[float] = []

    @property
    def lost(self) -> float:
        """Mean lost mass of that step."""
        return sum(self._lost) / len(self._lost)

    def __call__(self, at: Moment, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if at.step != self._step:
            return scaled_dot_product_attention(q, k, v, scale=scale)
        full = self._backend.forward(Inputs(q, k, v, scale), None, "mass")
        assert full.score is not None
        kept = self._backend.forward(Inputs(q, k, v, scale), make_lists(_worth_keeping(full.score)))
        self._lost.append(float(lost_mass(kept.lse, full.lse).mean()))
        return kept.out


def _worth_keeping(score: Tensor) -> Tensor:
    """All tiles of ``score [B, H, Tq, Tk]`` (log2 of their mass) except the least important."""
    mass, order = score.exp2().flatten().sort()
    left_out = mass.cumsum(0) <= LEFT_OUT * score[..., 0].numel()
    live = torch.ones_like(mass, dtype=torch.bool)
    live[order[left_out]] = False
    return live.view(score.shape).scatter(-1, score.argmax(-1, keepdim=True), True)


def measure(videos: DemoVideos, case: Case) -> list[dict[str, Any]]:
    """A row for every step of ``STEPS``."""
    dense = videos.dense(case).video
    rows = []
    for step in tqdm(STEPS, desc=f"seed {case.seed}"):
        one = OneStep(step)
        video, _ = videos.through(one, case)
        error = float((video.double() - dense).square().mean())
        position = (step + 1) / case.steps
        sensitivity = error / one.lost**2
        rows.append(
            {"seed": case.seed, "step": step, "position": position, "lost_mass": one.lost}
            | {"mean_square_error": error, "sensitivity": sensitivity}
        )
    return rows


def best_ramp(rows: list[dict[str, Any]]) -> float:
    """The ramp ``p`` for which ``position ** p`` best fits the sensitivity to the power -1/2."""
    x, y = (np.log([row[key] for row in rows]) for key in ("position", "sensitivity"))
    return float(-np.polyfit(x, y, 1)[0] / 2)


def by_step(rows: list[dict[str, Any]]) -> dict[int, float]:
    """Sensitivity of each step relative to the seed's most sensitive step, geometric mean over the
    seeds."""
    most: dict[int, float] = {}
    for row in rows:
        most[row["seed"]] = max(row["sensitivity"], most.get(row["seed"], 0.0))
    logs: dict[int, list[float]] = {step: [] for step in STEPS}
    for row in rows:
        logs[row["step"]].append(np.log(row["sensitivity"] / most[row["seed"]]))
    return {step: float(np.exp(np.mean(some))) for step, some in logs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.sensitivity", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--seeds", type=int, default=len(DEVELOPMENT))
    options = parser.parse_args()
    videos = DemoVideos()
    rows = [row for case in DEVELOPMENT[: options.seeds] for row in measure(videos, case)]
    print("seed  step    lost  mean square error  sensitivity")
    for row in rows:
        print(
            f"{row['seed']:>4} {row['step']:>5} {row['lost_mass']:>7.2%} "
            f"{row['mean_square_error']:>18.2e} {row['sensitivity']:>12.4f}"
        )
    print("over the most sensitive step's:", {s: f"{x:.2g}" for s, x in by_step(rows).items()})
    ramps = {
        seed: best_ramp([row for row in rows if row["seed"] == seed])
        for seed in sorted({row["seed"] for row in rows})
    }
    print("ramp that fits, by seed:", {seed: round(ramp, 2) for seed, ramp in ramps.items()})
    if options.json:
        write_json(options.json, ramp=ramps, rows=rows)


if __name__ == "__main__":
    main()
