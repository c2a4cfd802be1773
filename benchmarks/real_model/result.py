"""Closeness against speed-up, as a table in the form that papers use, and pictures side by side."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from comfyui_liteattention.report.compare import compare, side_by_side
from comfyui_liteattention.report.perceptual import Distance

from .store import DENSE, Job, Store

EQUAL = 100.0  # dB, where frames are equal: JSON has no infinity
AMPLIFY = 4.0
#: Figures from the papers of other methods. They were measured on other prompts, cards and base
#: lines, so they are only a rough orientation.
THEIRS = (
    ("SVG-EAR", "Wan 2.2", 1.77, 29.8),
    ("SVOO", "Wan 2.2", 1.93, 29.0),
    ("SVG2", "Wan 2.1", 1.89, 26.0),
)


class Row(NamedTuple):
    """Means over the videos that exist both for a variant and for dense."""

    variant: str
    videos: int
    seconds: float
    speedup: float
    peak_gib: float | None
    computed: float | None
    psnr_db: float
    worst_db: float
    ssim: float
    lpips: float | None


def measure(store: Store, jobs: Sequence[Job], lpips: Distance | None) -> list[dict[str, Any]]:
    """Figures of every finished run, with its closeness to the dense run of the same prompt and
    seed."""
    rows = []
    for job in jobs:
        dense = job._replace(variant=DENSE)
        if not (store.has(job) and store.has(dense)):
            continue
        row = store.figures(job)
        if job.variant != DENSE:
            closeness = compare(store.video(dense), store.video(job), lpips=lpips)
            row |= {
                "psnr_db": min(closeness.psnr_all, EQUAL),
                "ssim": closeness.ssim_mean,
                "lpips": closeness.lpips_mean,
            }
            row["speedup"] = store.figures(dense)["seconds"] / row["seconds"]
        rows.append(row)
    return rows


def summarise(runs: Sequence[dict[str, Any]]) -> list[Row]:
    """One row for each variant, in the order in which they come."""
    rows = []
    for variant in dict.fromkeys(run["variant"] for run in runs):
        mine = [run for run in runs if run["variant"] == variant]

        def mean(name: str, mine: list[dict[str, Any]] = mine) -> float | None:
            known = [run[name] for run in mine if run.get(name) is not None]
            return statistics.mean(known) if known else None

        rows.append(
            Row(
                variant,
                len(mine),
                mean("seconds") or 0.0,
                mean("speedup") or 1.0,
                max((run["peak_gib"] for run in mine if "peak_gib" in run), default=None),
                mean("computed"),
                EQUAL if variant == DENSE else mean("psnr_db") or 0.0,
                min((run["psnr_db"] for run in mine if "psnr_db" in run), default=EQUAL),
                1.0 if variant == DENSE else mean("ssim") or 0.0,
                mean("lpips"),
            )
        )
    return rows


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = [
        "| | videos | seconds | speed-up | peak GiB | tiles | PSNR (worst video) | SSIM | LPIPS |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        dense = row.variant == DENSE
        db = "-" if dense else f"{row.psnr_db:.1f} ({row.worst_db:.1f}) dB"
        cells = (
            *(row.variant, str(row.videos), f"{row.seconds:.1f}", f"{row.speedup:.2f}x"),
            *(_shown(row.peak_gib, ".1f"), _shown(row.computed, ".1%")),
            *(db, "-" if dense else f"{row.ssim:.4f}", _shown(row.lpips, ".4f")),
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        f"| *{name}, {model}: its paper's figures* | | | *{speedup}x* | | | *{db} dB* | | |"
        for name, model, speedup, db in THEIRS
    ]
    return "\n".join(lines)


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def draw(store: Store, jobs: Sequence[Job]) -> list[Path]:
    """Dense, variant and difference side by side: a picture of the middle frame of every run."""
    drawn = []
    for job in jobs:
        dense = job._replace(variant=DENSE)
        if job.variant == DENSE or not (store.has(job) and store.has(dense)):
            continue
        before, after = _middle(store.video(dense)), _middle(store.video(job))
        picture = side_by_side(before, after, compare(before, after), AMPLIFY)[0]
        path = store.folder / f"{job.key}.png"
        Image.fromarray((picture * 255).round().byte().numpy()).save(path)
        drawn.append(path)
    return drawn


def _middle(video: Tensor) -> Tensor:
    return video[torch.tensor([len(video) // 2])]
