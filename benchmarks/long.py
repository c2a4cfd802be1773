"""How long a whole video takes, without and with LiteAttention: ``python -m benchmarks.long``.

Samples the demo's model end to end at 4k to 16k tokens (or other sizes: ``--tokens 32768``): dense
with torch's SDPA, then with every preset as it ships. Several rounds alternate between them, so
that a machine that slows down affects all alike. Closeness to the dense video is given as PSNR,
SSIM and, where its weights are present, LPIPS. For comparison there is a noise floor: the same
video with nothing skipped, computed by another kernel and in bfloat16.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import comfyui_liteattention as lite
from benchmarks.demo_video import HELD_OUT, Case, DemoVideos, Sampled
from benchmarks.record import write_json
from benchmarks.rivals import Everything
from comfyui_liteattention.presets import PRESETS
from comfyui_liteattention.report.compare import compare
from comfyui_liteattention.report.perceptual import lpips_distance

TOKENS = (4096, 8192, 16384)
#: Of the demo's model: tokens per latent frame, and the pictures that diffusers counts for each
#: latent frame but the first.
TOKENS_PER_FRAME, PICTURES_PER_FRAME = 256, 4
DENSE = "dense"
#: Dense attention computed in other ways. How far these are from dense is due to rounding alone.
NOISE_FLOOR = {
    "dense, our kernel": torch.float32,
    "dense, bfloat16": torch.bfloat16,
}

Sample = Callable[[], Sampled]


def main() -> None:
    options = _parse()
    rows: list[dict[str, Any]] = []
    case = HELD_OUT[0]
    for tokens in options.tokens:
        videos = DemoVideos(num_frames=pictures(tokens))
        _warm_up(videos)
        for steps in options.steps:
            ways = _ways(videos, case._replace(steps=steps), options)
            at = {"tokens": tokens, "steps": steps, "seed": case.seed}
            rows += [at | row for row in measure(ways, options.rounds)]
            print(table(rows), flush=True)
            if options.json:
                write_json(options.json, rows=rows)


def measure(ways: dict[str, Sample], rounds: int) -> list[dict[str, Any]]:
    """A row for every way to make the video. ``seconds`` is the time of the fastest round, the one
    least disturbed by other programs. The others are compared with the first way."""
    made: dict[str, Sampled] = {}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, sample in ways.items():
            print(f"{name} ...", flush=True)
            made[name] = sample()
            seconds[name].append(made[name].seconds)
    (reference, *_) = made.values()
    distance = lpips_distance()
    rows = []
    for name, video in made.items():
        row = {
            "way": name,
            "seconds": round(min(seconds[name]), 2),
            "all_seconds": [round(value, 2) for value in seconds[name]],
            "computed_fraction": round(video.computed, 4),
        }
        if video is not reference:
            close = compare(reference.video, video.video, lpips=distance)
            row |= {"psnr_db": round(min(close.psnr_all, 200.0), 2), "ssim": close.ssim_mean}
            row |= {"lpips": close.lpips_mean}
        rows.append(row)
    return rows


def pictures(tokens: int) -> int:
    """Number of pictures of a video with so many tokens."""
    return (tokens // TOKENS_PER_FRAME - 1) * PICTURES_PER_FRAME + 1


def table(rows: list[dict[str, Any]]) -> str:
    """Seconds and speed-up over dense, for every size, number of steps and way."""
    lines = [
        f"{'tokens':>7} {'steps':>5}  {'':<18} {'seconds':>8} {'':>6} {'tiles':>6} {'PSNR':>8}"
    ]
    for row in rows:
        dense = next(
            r["seconds"]
            for r in rows
            if (r["tokens"], r["steps"], r["way"]) == (row["tokens"], row["steps"], DENSE)
        )
        psnr = f"{row['psnr_db']:.1f} dB" if "psnr_db" in row else ""
        lines.append(
            f"{row['tokens']:>7,} {row['steps']:>5}  {row['way']:<18} {row['seconds']:>8.1f} "
            f"{dense / row['seconds']:>5.2f}x {row['computed_fraction']:>6.1%} {psnr:>8}"
        )
    return "\n".join(lines)


def _ways(videos: DemoVideos, case: Case, options: argparse.Namespace) -> dict[str, Sample]:
    ways: dict[str, Sample] = {DENSE: lambda: videos.dense(case)}
    for name in options.presets:
        ways[name] = lambda name=name: videos.shipped(case, name)  # type: ignore[misc]
    if options.noise_floor:
        for name, dtype in NOISE_FLOOR.items():
            ways[name] = lambda dtype=dtype: videos.rival(case, Everything(dtype))  # type: ignore[misc]
    return ways


def _warm_up(videos: DemoVideos) -> None:
    """Compile the kernel before anything is timed."""
    with lite.enabled(videos.pipe):
        videos.dense(HELD_OUT[0]._replace(steps=2))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.long", description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--steps", type=int, nargs="+", default=[8])
    parser.add_argument("--presets", nargs="+", choices=[*PRESETS], default=[*PRESETS])
    parser.add_argument("--rounds", type=int, default=2, help="the fastest of them counts")
    parser.add_argument("--noise-floor", action="store_true", help="dense by other kernels, too")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


if __name__ == "__main__":
    main()
