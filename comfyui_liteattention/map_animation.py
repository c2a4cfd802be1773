"""The tile maps of a run, step after step, as an animated WebP.

The last step comes first: where only one frame is shown (on a canvas, in a thumbnail), it is that
one. Round and round it makes no difference.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from .canvas import THEMES, Theme
from .map_history import ALL, StepMap
from .report import RunReport
from .report_images import SIZE, draw_maps, map_page, short_names

FRAMES = 16  # at most: a picture takes a while to draw, and of longer runs some steps will do
SECONDS = 6.0  # for all frames
LONGEST = 0.8  # seconds for a step of a short run
LAST = 1.5  # seconds that the last one stays
BAR = 6  # pixels


def animation(report: RunReport | None, theme: str = "dark") -> bytes | None:
    """The file, or None where no maps were kept."""
    if report is None or not report.history:
        return None
    steps = shown_steps(report.history)
    frames = [
        _frame(report.history, step, (i + 1) / len(steps), THEMES[theme])
        for i, step in enumerate(steps)
    ]
    frames = [frames[-1], *frames[:-1]]
    seconds = [LAST] + [min(SECONDS / len(frames), LONGEST)] * (len(frames) - 1)
    file = io.BytesIO()
    # Few colours: without loss it is smaller, and sharp.
    frames[0].save(
        file,
        "WEBP",
        save_all=True,
        append_images=frames[1:],
        duration=[round(1000 * some) for some in seconds],
        loop=0,
        lossless=True,
        quality=0,
        method=0,
    )
    return file.getvalue()


def shown_steps(history: Sequence[StepMap]) -> list[int]:
    """The step before the first map, which was dense, and those with maps; some, of a long run."""
    steps = sorted({one.step for one in history})
    steps.insert(0, steps[0] - 1)
    count = min(FRAMES, len(steps))
    return [steps[round(i * (len(steps) - 1) / (count - 1))] for i in range(count)]


def _frame(history: Sequence[StepMap], step: int, done: float, theme: Theme) -> Image.Image:
    sizes = {one.layer: one.live.shape for one in history}
    now = {one.layer: one.live.numpy() / ALL for one in history if one.step == step}
    shares = [now.get(layer, np.ones(size)) for layer, size in sizes.items()]
    canvas = map_page(theme, f"Step {step}")
    draw_maps(canvas, short_names(list(sizes)), shares, len(sizes))
    width, height = SIZE
    canvas.box((0, height - BAR, width, height), theme.panel)
    canvas.box((0, height - BAR, width * done, height), theme.accent)
    return canvas.image()
