"""Does a preset mean one closeness at any number of steps? ``python -m benchmarks.closeness``.

Samples the demo's model with every preset at several numbers of steps, on prompts and seeds that
were kept out of tuning, and compares each video with the dense one of the same seed and steps: its
PSNR, and what the run's own report had expected. ``--ways`` does so for other schedules, strengths
of guidance and samplers than those of the calibration, and for two experts. With ``--json``, what
is there already is not measured again.
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.demo_video import DEVELOPMENT, HELD_OUT, Case, DemoVideos, Way
from benchmarks.record import write_json
from comfyui_liteattention.presets import PRESETS
from comfyui_liteattention.report.compare import compare
from comfyui_liteattention.report.statistics import RunReport, tiles

STEPS = (4, 8, 20, 50)
CALIBRATED, EXPERTS = "calibrated", "two experts"
WAYS = {
    CALIBRATED: Way(),
    "shift 5": Way(shift=5),
    "shift 12": Way(shift=12),
    "no guidance": Way(guidance=1),
    "guidance 6": Way(guidance=6),
    "UniPC": Way(unipc=True),
    EXPERTS: Way(experts=True),
}


def measure(videos: DemoVideos, case: Case, way: str, presets: list[str]) -> list[dict[str, Any]]:
    """A row for every preset."""
    dense = videos.dense(case)
    rows = []
    for preset in presets:
        sampled = videos.lite(case, PRESETS[preset])
        assert sampled.report is not None and sampled.report.expected is not None
        row = {
            "way": way,
            "preset": preset,
            "steps": case.steps,
            "seed": case.seed,
            "psnr_db": round(compare(dense.video, sampled.video).psnr_all, 2),
            "predicted_db": round(sampled.report.expected.db, 2),
            "computed_fraction": round(sampled.computed, 4),
            "lost_mass": round(sampled.lost, 5),
        }
        if WAYS[way].experts:
            row["computed_by_second_expert"] = _of_second_expert(sampled.report)
        print(*row.values(), flush=True)
        rows.append(row)
    return rows


def _of_second_expert(report: RunReport) -> float:
    """Share of its tiles that the second transformer computed."""
    computed, total = tiles(c for c in report.calls if c.layer.startswith("transformer_2."))
    return round(computed / total, 4)


def main() -> None:
    options = _parse()
    there = options.json and options.json.exists()
    rows = json.loads(options.json.read_text())["rows"] if there else []
    done = {(row["way"], row["steps"], row["seed"], row["preset"]) for row in rows}
    cases = DEVELOPMENT if options.development else HELD_OUT
    for way in options.ways:
        videos = DemoVideos(way=WAYS[way])
        for case, steps in product(cases[: options.seeds], options.steps):
            left = [p for p in options.presets if (way, steps, case.seed, p) not in done]
            if not left:
                continue
            rows += measure(videos, case._replace(steps=steps), way, left)
            if options.json:
                write_json(options.json, rows=rows)  # each time, because it takes long
    print(table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    """Ranges and means over the seeds."""
    lines = [f"{'way':<12} {'preset':<10} {'steps':>5} {'tiles':>6} {'PSNR dB':>12} {'off by':>7}"]
    kinds = [(row["way"], row["preset"], row["steps"]) for row in rows]
    for kind in dict.fromkeys(kinds):
        group = [row for row, its in zip(rows, kinds, strict=True) if its == kind]
        way, preset, steps = kind
        tiles = sum(row["computed_fraction"] for row in group) / len(group)
        psnr = sorted(row["psnr_db"] for row in group)
        off = sum(abs(row["psnr_db"] - row["predicted_db"]) for row in group) / len(group)
        spread = f"{psnr[0]:.1f} - {psnr[-1]:.1f}"
        lines.append(f"{way:<12} {preset:<10} {steps:>5} {tiles:>6.1%} {spread:>12} {off:>7.1f}")
    return "\n".join(lines)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.closeness", description=__doc__)
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--ways", nargs="+", choices=[*WAYS], default=[CALIBRATED])
    parser.add_argument("--development", action="store_true", help="videos used for tuning")
    parser.add_argument("--seeds", type=int, default=len(HELD_OUT))
    parser.add_argument("--presets", nargs="+", choices=[*PRESETS], default=["Balanced", "Fast"])
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


if __name__ == "__main__":
    main()
