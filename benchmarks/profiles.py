"""What a profile gains: ``python -m benchmarks.profiles``.

A profile is made in one run of 20 steps on the demo model and then used for other prompts, seeds
and numbers of steps, beside runs without it. The true loss is that of a dense shadow of every call.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.budget import measure
from benchmarks.demo_video import HELD_OUT, DemoVideos
from benchmarks.record import write_json
from comfyui_liteattention.profile import learned_in

BUDGET = 0.01
STEPS = (12, 30)


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.profiles", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    videos = DemoVideos()
    teacher, *others = HELD_OUT[:3]
    _, report = measure(videos, teacher, BUDGET)
    profiles = {"without": None, "with": learned_in(report)}
    rows: list[dict[str, Any]] = []
    for case, steps in tqdm([(case, steps) for steps in STEPS for case in others]):
        for name, profile in profiles.items():
            row, _ = measure(videos, case._replace(steps=steps), BUDGET, profile)
            rows.append({"profile": name} | row)
    print("profile  steps  seed  first marks / aim  true / budget  worst layer  computed")
    for row in rows:
        true, worst = (row[key] / BUDGET for key in ("true_lost", "worst_layer_lost"))
        print(
            f"{row['profile']:<8} {row['steps']:>5} {row['seed']:>5} "
            f"{row['first_marks_of_aim']:>18.2f} {true:>14.2f} {worst:>12.2f} "
            f"{row['computed_fraction']:>9.1%}"
        )
    if options.json:
        write_json(options.json, rows=rows)


if __name__ == "__main__":
    main()
