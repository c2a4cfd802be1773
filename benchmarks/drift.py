"""Can a run tell by itself that it drifts off? ``python -m benchmarks.drift``

Sampling turns Gaussian noise into a video, so the noise that a healthy model predicts at each step
should be Gaussian. The distance of its random projections from a normal distribution (Epps and
Pulley, Biometrika 1983; sketched as in LeJEPA's SIGReg, arXiv 2511.08544) needs no dense run. This
samples the demo model densely and at ever larger budgets, and asks how well that distance, at the
best of the steps, separates the runs that came out far from the dense video from those that came
out close: by the area under the ROC curve, 0.5 for no separation and 1 for a perfect one.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.demo_video import DEVELOPMENT, DemoVideos
from benchmarks.record import write_json
from comfyui_liteattention.compare import compare
from comfyui_liteattention.settings import Settings

BUDGETS = (0.01, 0.1, 0.3, 0.6)
#: A run below this is one that drifted.
CLOSE = 35.0  # dB
PROJECTIONS = 64


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.drift", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    videos = DemoVideos()
    rows = []
    for case in tqdm([case._replace(steps=options.steps) for case in DEVELOPMENT]):
        with predicted_noise(videos.pipe) as noise:
            dense = videos.dense(case).video
            rows.append({"seed": case.seed, "budget": 0.0, "psnr_db": None} | distances(noise))
        for budget in BUDGETS:
            with predicted_noise(videos.pipe) as noise:
                video = videos.lite(case, Settings(budget=budget)).video
            close = compare(dense, video).psnr_all
            rows.append({"seed": case.seed, "budget": budget, "psnr_db": close} | distances(noise))
    areas = [roc_area(rows, step) for step in range(options.steps)]
    for row in rows:
        psnr = "dense" if row["psnr_db"] is None else f"{row['psnr_db']:5.1f} dB"
        shown = "  ".join(f"{value:.4f}" for value in row["distance"][:: options.steps // 5])
        print(f"seed {row['seed']:>3}  budget {row['budget']:>5.1%}  {psnr:>8}  {shown}")
    print("area under the ROC curve, step by step:", "  ".join(f"{area:.2f}" for area in areas))
    if options.json:
        write_json(options.json, rows=rows, roc_area_by_step=areas)


@contextmanager
def predicted_noise(pipe: Any) -> Iterator[list[Tensor]]:
    """The noise that the model predicts at each step of the runs made meanwhile, ``[C, F, H, W]``.

    From ``x_t = (1 - sigma) x_0 + sigma noise`` and the velocity ``v = noise - x_0``, guidance
    included: ``noise = x_t + (1 - sigma) v``.
    """
    found: list[Tensor] = []
    step = pipe.scheduler.step

    def watched(
        velocity: Tensor, timestep: Tensor, sample: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        sigma = float(timestep) / pipe.scheduler.config.num_train_timesteps
        found.append((sample + (1 - sigma) * velocity)[0].float())
        return step(velocity, timestep, sample, *args, **kwargs)

    pipe.scheduler.step = watched
    try:
        yield found
    finally:
        pipe.scheduler.step = step


def distances(noise: list[Tensor]) -> dict[str, list[float]]:
    return {"distance": [gaussian_distance(x) for x in noise]}


def gaussian_distance(noise: Tensor, patch: int = 4) -> float:
    """How far ``noise [C, F, H, W]`` is from white standard Gaussian noise, by the characteristic
    functions of random projections of its patches: 0 for an exact match."""
    c, _, h, w = noise.shape
    cut = noise[:, :, : h // patch * patch, : w // patch * patch]
    patches = cut.unfold(2, patch, patch).unfold(3, patch, patch)  # [C, F, H', W', p, p]
    samples = patches.permute(1, 2, 3, 0, 4, 5).reshape(-1, c * patch * patch)
    random = torch.Generator().manual_seed(0)
    directions = torch.randn(samples.shape[1], PROJECTIONS, generator=random)
    projected = samples @ (directions / directions.norm(dim=0))
    t = torch.linspace(-4, 4, 33).view(-1, 1, 1)
    normal = torch.exp(-(t**2) / 2)
    real = torch.cos(t * projected).mean(1, keepdim=True) - normal
    imaginary = torch.sin(t * projected).mean(1, keepdim=True)
    return float(((real**2 + imaginary**2) * normal).sum(0).mean() * 0.25)


def roc_area(rows: list[dict[str, Any]], step: int) -> float:
    """Probability that a drifted run is farther from Gaussian than a close one, relative to the
    dense run of its seed."""
    dense = {row["seed"]: row["distance"][step] for row in rows if row["psnr_db"] is None}
    close: list[float] = []
    drifted: list[float] = []
    for row in rows:
        if row["psnr_db"] is not None:
            group = close if row["psnr_db"] >= CLOSE else drifted
            group.append(row["distance"][step] / dense[row["seed"]])
    pairs = [(d > c) + 0.5 * (d == c) for d in drifted for c in close]
    return sum(pairs) / len(pairs) if pairs else float("nan")


if __name__ == "__main__":
    main()
