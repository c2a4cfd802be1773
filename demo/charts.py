"""One picture of a run: what was computed and what was lost, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

INK, COMPUTED, LOST = "#333333", "#c77700", "#2a6fbb"


def draw_chart(report: dict[str, Any], path: Path) -> None:
    """``report`` is what the LiteAttentionReport node gives (``report.figures``)."""
    steps = [row["step"] + 1 for row in report["per_step"]]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 5), sharex=True)
    top.bar(steps, [100 * row["computed_fraction"] for row in report["per_step"]], color=COMPUTED)
    top.set_ylabel("tiles computed, %")
    top.set_ylim(0, 105)
    top.set_title(report["status"], fontsize=9, color=INK)
    measured = [(s, row["lost_mass"]) for s, row in zip(steps, report["per_step"], strict=True)]
    measured = [(s, 100 * lost) for s, lost in measured if lost is not None]
    bottom.plot(*zip(*measured, strict=True), marker="o", color=LOST)
    bottom.set_ylabel("lost mass, %")
    bottom.set_ylim(bottom=0)
    bottom.set_xlabel("step")
    bottom.xaxis.get_major_locator().set_params(integer=True)
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
