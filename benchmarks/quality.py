"""Ways of choosing tiles, by tiles computed and closeness: ``python -m benchmarks.quality``.

Samples the demo model (4,096 tokens, guidance, a few prompts) under every method at several
operating points, with 64 x 64 tiles. Records the share of the tiles that was computed (audits and
dense steps included), the measured lost mass, and PSNR and SSIM of the video to the dense one of
the same seed. `--json`, `--csv` and `--plot` write the results.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from benchmarks.demo_video import DEVELOPMENT, HELD_OUT, Case, DemoVideos, Sampled
from benchmarks.record import write_json
from benchmarks.rivals import (
    Everything,
    SolAttention,
    UpstreamSemantics,
    Window,
    check_sol_attention,
)
from comfyui_liteattention.report.compare import compare
from comfyui_liteattention.settings import Settings

GOALS = (35.0, 40.0)
BUDGETS = (0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7)
THRESHOLDS = (-1.5, -0.5, -0.05)
COLOURS = {
    "ours": "tab:orange",
    "upstream": "tab:blue",
    "sol_attn": "tab:green",
    "window": "tab:purple",
}


class Point(NamedTuple):
    """A method at one operating point; ``sample`` makes its video."""

    method: str
    setting: str
    sample: Callable[[DemoVideos, Case], Sampled]


def main() -> None:
    options = _parse()
    print(check_sol_attention())
    chosen = (HELD_OUT if options.held_out else DEVELOPMENT)[: options.seeds]
    cases = tuple(case._replace(steps=options.steps) for case in chosen)
    points = [p for p in all_points() if not options.only or p.method in options.only]
    rows = measure(points, cases)
    goals = goal_table(rows)
    print(table(rows), summary(goals), sep="\n")
    if options.json:
        write_json(options.json, **document(rows, goals, options.steps))
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    if options.plot:
        plot(rows, options.plot)


def all_points() -> list[Point]:
    """Other methods, ours, and ours with one thing changed."""
    points = [
        rival("upstream", f"threshold {t}", UpstreamSemantics, t)
        for t in (-7, -5.5, -4, -2, -1, -0.3)
    ]
    points += [rival("sol_attn", f"tau {t}", SolAttention, t) for t in (-1.5, -0.9, -0.5, 0, 0.5)]
    points += [
        rival("sol_attn, 20 % dense start", f"tau {t}", SolAttention, t, 0.2)
        for t in (-0.9, 0, 0.5)
    ]
    points += [
        rival("dense", f"our kernel, {str(dtype).removeprefix('torch.')}", Everything, dtype)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    points += [rival("window", f"{w} tiles", Window, w) for w in (40, 28, 16)]
    default = Settings()
    points += [ours("ours", replace(default, budget=b)) for b in BUDGETS]
    for name, changed in {
        "ours, raster order": replace(default, order="raster"),
        "ours, no ramp": replace(default, ramp=0.0),
        "ours, ramp 1": replace(default, ramp=1.0),
        "ours, no tail": replace(default, tail=False),
        "ours, audit 16": replace(default, audit=16),
        "ours, 20 % dense start": replace(default, warmup=0.2),
    }.items():
        points += [ours(name, replace(changed, budget=b)) for b in (0.03, 0.1)]
    points += [ours("ours, threshold", replace(default, threshold=t)) for t in THRESHOLDS]
    points += [
        ours("ours, threshold without ramp", replace(default, ramp=0.0, threshold=t))
        for t in (-5.0, -3.5, -2.5)
    ]
    points += [
        ours("ours, gap threshold", replace(default, criterion="gap", threshold=t))
        for t in (-8.0, -4.0, -2.0)
    ]
    return points


def rival(method: str, setting: str, kind: Callable[..., Any], *values: Any) -> Point:
    return Point(method, setting, lambda videos, case: videos.rival(case, kind(*values)))


def ours(method: str, settings: Settings) -> Point:
    setting = (
        f"threshold {settings.threshold}"
        if settings.budget is None
        else f"budget {settings.budget:.1%}"
    )
    return Point(method, setting, lambda videos, case: videos.lite(case, settings))


def measure(points: list[Point], cases: Iterable[Case]) -> list[dict[str, Any]]:
    """A row for every point and case."""
    videos = DemoVideos()
    rows = []
    for case in cases:
        dense = videos.dense(case)
        for point in tqdm(points, desc=f"seed {case.seed}"):
            sampled = point.sample(videos, case)
            close = compare(dense.video, sampled.video)
            rows.append(
                {
                    "method": point.method,
                    "setting": point.setting,
                    "seed": case.seed,
                    "steps": case.steps,
                    "computed_fraction": round(sampled.computed, 4),
                    "lost_mass": round(sampled.lost, 5),
                    "psnr_db": round(close.psnr_all, 2),
                    "ssim": round(close.ssim_mean, 5),
                    "seconds": round(sampled.seconds, 1),
                    "dense_seconds": round(dense.seconds, 1),
                }
            )
    return rows


def computed_at(points: list[tuple[float, float]], goal: float) -> float | None:
    """Computed fraction at which a curve of (computed fraction, PSNR) reaches ``goal`` dB,
    interpolated linearly; None where it doesn't cross it."""
    points = sorted(points)
    crossings = [
        x0 + (x1 - x0) * (goal - y0) / (y1 - y0)
        for (x0, y0), (x1, y1) in pairwise(points)
        if y0 < goal <= y1
    ]
    return min(crossings, default=None)


def goal_table(rows: list[dict[str, Any]]) -> dict[str, dict[float, list[float | None]]]:
    """For each method and goal, the computed fraction of each seed."""
    curves: dict[str, dict[int, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        curves[row["method"]][row["seed"]].append((row["computed_fraction"], row["psnr_db"]))
    return {
        method: {goal: [computed_at(points, goal) for points in seeds.values()] for goal in GOALS}
        for method, seeds in curves.items()
    }


def document(rows: list[dict[str, Any]], goals: Any, steps: int) -> dict[str, Any]:
    """What ``--json`` writes besides the machine."""
    at_35 = {method: _mean(by_goal[35.0]) for method, by_goal in goals.items()}
    return {
        "steps": steps,
        "computed_fraction_at_35db": at_35,
        "computed_fraction_at_goal_per_seed": goals,
        "rows": rows,
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"{'method':<28} {'setting':<16} {'computed':>9} {'lost':>8} {'PSNR dB':>8} {'SSIM':>7}"
    ]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["method"], row["setting"]].append(row)
    for (method, setting), group in groups.items():
        computed, lost, db, similar = (
            sum(row[key] for row in group) / len(group)
            for key in ("computed_fraction", "lost_mass", "psnr_db", "ssim")
        )
        lines.append(
            f"{method:<28} {setting:<16} {computed:>9.1%} {lost:>9.2%} {db:>9.1f} {similar:>9.4f}"
        )
    return "\n".join(lines)


def summary(goals: dict[str, dict[float, list[float | None]]]) -> str:
    lines = ["", "tiles to compute for" + "".join(f"{goal:>10.0f} dB" for goal in GOALS)]
    for method, by_goal in goals.items():
        cells = (_mean(by_goal[goal]) for goal in GOALS)
        lines.append(
            f"{method:<28}" + "".join(f"{'-' if c is None else f'{c:.1%}':>13}" for c in cells)
        )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """PSNR against computed fraction, averaged over the cases: a line for every method, a mark for
    every change to ours, and what rounding alone changes."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    groups: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        groups[row["method"]][row["setting"]].append(row)
    curves = {
        method: sorted(
            tuple(
                sum(row[key] for row in group) / len(group)
                for key in ("computed_fraction", "psnr_db")
            )
            for group in settings.values()
        )
        for method, settings in groups.items()
    }
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    marks = iter("sD^v<>P*Xdph")
    for method, curve in curves.items():
        family = method.split(",")[0]
        if method == "dense":
            floor = min(db for _, db in curve)
            axes.axhline(floor, color="0.6", linewidth=1, label="dense, rounded to bfloat16")
            continue
        axes.plot(
            *zip(*curve, strict=True),
            label=method,
            color=COLOURS.get(family),
            linewidth=2.5 if method == "ours" else 0.6 if family == "ours" else 1.5,
            linestyle="-" if method == family else ":",
            marker="o" if method == family else next(marks),
            markersize=6 if method == "ours" else 5,
            alpha=1 if method == family else 0.7,
        )
    axes.set_xlabel("tiles computed, fraction of all")
    axes.set_ylabel("PSNR to the dense video, dB")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _mean(values: list[float | None]) -> float | None:
    """The mean, or None if any value is missing, since means over fewer seeds aren't comparable."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.quality", description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--held-out", action="store_true", help="prompts kept out of tuning")
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="these methods alone")
    for name in ("json", "csv", "plot"):
        parser.add_argument(f"--{name}", type=Path, metavar="FILE")
    return parser.parse_args()


if __name__ == "__main__":
    main()
