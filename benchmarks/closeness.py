"""Does a preset mean one closeness at any number of steps? ``python -m benchmarks.closeness``.

Samples the demo's model with every preset at several numbers of steps, on prompts and seeds that
were kept out of tuning, and compares each video with the dense one of the same seed and steps: its
PSNR, and what the run's own report had expected.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.demo_video import HELD_OUT, Case, DemoVideos
from benchmarks.record import write_json
from comfyui_liteattention.presets import PRESETS
from comfyui_liteattention.report.compare import compare

STEPS = (4, 8, 20, 50)


def measure(videos: DemoVideos, case: Case, presets: list[str]) -> list[dict[str, Any]]:
    """A row for every preset."""
    dense = videos.dense(case)
    rows = []
    for preset in presets:
        sampled = videos.lite(case, PRESETS[preset])
        assert sampled.report is not None and sampled.report.expected is not None
        rows.append(
            {
                "preset": preset,
                "steps": case.steps,
                "seed": case.seed,
                "psnr_db": round(compare(dense.video, sampled.video).psnr_all, 2),
                "predicted_db": round(sampled.report.expected.db, 2),
                "computed_fraction": round(sampled.computed, 4),
                "lost_mass": round(sampled.lost, 5),
            }
        )
        print(*rows[-1].values(), flush=True)
    return rows


def main() -> None:
    options = _parse()
    videos = DemoVideos()
    rows: list[dict[str, Any]] = []
    for case in HELD_OUT[: options.seeds]:
        for steps in options.steps:
            rows += measure(videos, case._replace(steps=steps), options.presets)
            if options.json:
                write_json(options.json, rows=rows)  # each time, because it takes long
    print(table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    """Ranges and means over the seeds."""
    lines = [f"{'preset':<10} {'steps':>5} {'tiles':>6} {'PSNR dB':>12} {'off by':>7}"]
    for preset, steps in dict.fromkeys((row["preset"], row["steps"]) for row in rows):
        group = [row for row in rows if (row["preset"], row["steps"]) == (preset, steps)]
        tiles = sum(row["computed_fraction"] for row in group) / len(group)
        psnr = sorted(row["psnr_db"] for row in group)
        off = sum(abs(row["psnr_db"] - row["predicted_db"]) for row in group) / len(group)
        spread = f"{psnr[0]:.1f} - {psnr[-1]:.1f}"
        lines.append(f"{preset:<10} {steps:>5} {tiles:>6.1%} {spread:>12} {off:>7.1f}")
    return "\n".join(lines)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.closeness", description=__doc__)
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--seeds", type=int, default=len(HELD_OUT))
    parser.add_argument("--presets", nargs="+", choices=[*PRESETS], default=["Balanced", "Fast"])
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


if __name__ == "__main__":
    main()
