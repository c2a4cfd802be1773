"""Is the error budget held? ``python -m benchmarks.budget``.

Samples the demo model with a budget, on prompts and seeds that were kept out of tuning. Every call
is computed a second time, densely, which gives its true loss over all rows. Divided by the budget,
the true loss should lie between 0.5 and 1.0, and that of a single layer not above 2.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from benchmarks.demo_video import HELD_OUT, Case, DemoVideos, Moment
from benchmarks.record import write_json
from comfyui_liteattention.backends.base import Attended, Criterion, Inputs, some_of
from comfyui_liteattention.backends.cpu.backend import CpuBackend
from comfyui_liteattention.plan import Plan
from comfyui_liteattention.policy import lost_mass
from comfyui_liteattention.report.statistics import RunReport, loss_intervals
from comfyui_liteattention.run import Run
from comfyui_liteattention.schedule import Progress
from comfyui_liteattention.settings import Settings
from comfyui_liteattention.tiles import TileLists
from comfyui_liteattention.token_order import VideoTokens
from demo.model import LATENT_SHAPE

BUDGETS = (0.002, 0.01, 0.03, 0.1)


class ShadowedBackend(CpuBackend):
    """Also computes each call densely; ``lost`` is the true mean lost mass of the last call."""

    lost = 0.0

    def forward(
        self, call: Inputs, lists: TileLists | None = None, criterion: Criterion | None = None
    ) -> Attended:
        result = super().forward(call, lists, criterion)
        if lists is not None:
            self.lost = float(lost_mass(result.lse, super().forward(call).lse).mean())
        return result

    def forward_and_audit(
        self, call: Inputs, lists: TileLists, criterion: Criterion | None, audited: range
    ) -> tuple[Attended, Attended]:
        some = some_of(call, audited, self.tile)
        return self.forward(call, lists, criterion), super().forward(some)


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.budget", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    videos = DemoVideos()
    rows = [
        measure(videos, case._replace(steps=options.steps), budget)[0]
        for case, budget in tqdm([(case, b) for case in HELD_OUT for b in BUDGETS])
    ]
    print("loss over budget\n budget  seed   true  audit  worst layer   within 95 %")
    for row in rows:
        true, audit, worst = (
            row[key] / row["budget"] for key in ("true_lost", "audited_lost", "worst_layer_lost")
        )
        print(
            f"{row['budget']:>7.1%} {row['seed']:>5} {true:>6.2f} {audit:>6.2f} {worst:>12.2f} "
            f"{row['cells_within_interval']:>13.0%}"
        )
    if options.json:
        write_json(options.json, steps=options.steps, rows=rows)


def measure(videos: DemoVideos, case: Case, budget: float) -> tuple[dict[str, Any], RunReport]:
    """One video with a budget: true and audited loss, averaged over the run; the loss of the second
    step, at which the first marks take effect, relative to what was aimed at; and the share of the
    (layer, step) cells whose true loss lies within the run's interval. Also the run's report."""
    backend = ShadowedBackend()
    settings = Settings(budget=budget)
    run = Run(settings, backend, range(case.steps, -1, -1))
    _, frames, height, width = LATENT_SHAPE
    video = VideoTokens((frames, height // 2, width // 2))
    truth: defaultdict[tuple[str, int], list[float]] = defaultdict(list)
    second_step: list[float] = []

    def attend(at: Moment, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        backend.lost = 0.0
        progress = Progress(at.step, (at.step + 1) / case.steps)
        out = run.attend(at.layer, [at.stream], progress, Inputs(q, k, v, scale), video)
        if out is None:
            raise RuntimeError(f"declined: {run.report().reasons}")
        truth[at.layer, at.step].append(backend.lost)
        if at.step == 1:
            second_step.append(backend.lost)
        return out

    videos.through(attend, case)
    report = run.finish()
    cells = {cell: sum(values) / len(values) for cell, values in truth.items()}
    per_layer = {
        layer: sum(cells[layer, step] for step in range(case.steps)) / case.steps
        for layer in {layer for layer, _ in cells}
    }
    told = loss_intervals(report)
    within = [told[cell].low <= cells[cell] <= told[cell].high for cell in told]
    aim = Plan(settings, (), known=False).aim(Progress(0, 1 / case.steps))
    assert aim is not None
    row = {
        "budget": budget,
        "seed": case.seed,
        "steps": case.steps,
        "first_marks_of_aim": sum(second_step) / len(second_step) / aim,
        "true_lost": sum(per_layer.values()) / len(per_layer),
        "audited_lost": report.lost_mass_mean,
        "worst_layer_lost": max(per_layer.values()),
        "cells_within_interval": sum(within) / len(within),
        "computed_fraction": report.computed_fraction,
    }
    return row, report


if __name__ == "__main__":
    main()
