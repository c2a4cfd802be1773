"""The tile maps of a run, step after step, as an animated WebP.

The last step comes first, because thumbnails show the first frame; in a loop this makes no
difference.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from .canvas import THEMES, Canvas, Theme, fit
from .map_history import ALL, LAYERS, SIDE, StepMap
from .statistics import RunReport, layer_labels

FRAMES = 12  # at most: each takes a while to write, and a long run can do with some of its steps
SECONDS = 6.0  # of all frames together
LONGEST = 0.8  # seconds for a step of a short run
LAST = 1.5  # seconds that the last one stays
# A strip not much wider than the node that shows it; larger ones take longer to write.
SIZE = (640, 208)
MAP = 2 * SIDE  # two pixels for a cell
GAP = 24
MARGIN = (SIZE[0] - LAYERS * (MAP + GAP) + GAP) // 2
TOP = 70  # upper edge of the maps
BAR = 4
TITLE, LABEL = 22, 16  # font sizes


def animation(report: RunReport | None, theme: str = "dark") -> bytes | None:
    """The content of the WebP file, or None where no maps were kept."""
    if report is None or not report.history:
        return None
    # Latest first: at the last step most layers have a map, at earlier ones some may lack it.
    latest = sorted(report.history, key=lambda one: -one.step)
    dense = {one.layer: np.ones(one.live.shape) for one in latest}
    page = _page(THEMES[theme], list(dense))
    steps = shown_steps(report.history)
    frames = []
    for i, step in enumerate(steps):
        maps = {one.layer: one.live.numpy() / ALL for one in report.history if one.step == step}
        shares = list((dense | maps).values())
        frames.append(_frame(page.copy(), step, (i + 1) / len(steps), shares))
    return _webp([frames[-1], *frames[:-1]])


def shown_steps(history: Sequence[StepMap]) -> list[int]:
    """The dense step before the first map, and the steps with maps; of a long run, some of them."""
    steps = sorted({one.step for one in history})
    steps.insert(0, steps[0] - 1)
    count = min(FRAMES, len(steps))
    return [steps[round(i * (len(steps) - 1) / (count - 1))] for i in range(count)]


def _page(theme: Theme, layers: Sequence[str]) -> Canvas:
    """What is the same in all frames."""
    canvas = Canvas(theme, SIZE)
    right = SIZE[0] - MARGIN
    canvas.text((right, 30), "computed", LABEL, theme.faint, "rs")
    canvas.shares(np.linspace(0, 1, 256)[None], (right - 148, 19, right - 84, 31))
    canvas.text((right - 156, 30), "skipped", LABEL, theme.faint, "rs")
    for x, name in zip(_places(len(layers)), layer_labels(layers), strict=True):
        size = fit(name, MAP - 3 * LABEL, LABEL)
        canvas.text((x, TOP - 8), name, size, theme.ink, "ls")
    canvas.box((0, SIZE[1] - BAR, *SIZE), theme.panel)
    return canvas


def _frame(canvas: Canvas, step: int, done: float, shares: Sequence[np.ndarray]) -> Image.Image:
    canvas.text((MARGIN, 30), f"Step {step + 1}", TITLE, anchor="ls")
    for x, share in zip(_places(len(shares)), shares, strict=True):
        percent = f"{share.mean():.0%}"
        canvas.text((x + MAP, TOP - 8), percent, LABEL, canvas.theme.faint, "rs")
        canvas.shares(share, (x, TOP, x + MAP, TOP + MAP))
    canvas.box((0, SIZE[1] - BAR, SIZE[0] * done, SIZE[1]), canvas.theme.accent)
    return canvas.image()


def _places(count: int) -> list[float]:
    """The left edges of ``count`` maps, centred in the strip."""
    first = (SIZE[0] - count * (MAP + GAP) + GAP) / 2
    return [first + i * (MAP + GAP) for i in range(count)]


def _webp(frames: Sequence[Image.Image]) -> bytes:
    """Lossless, which for a few colours is both sharp and smaller."""
    seconds = [LAST] + [min(SECONDS / len(frames), LONGEST)] * (len(frames) - 1)
    file = io.BytesIO()
    frames[0].save(
        file,
        "WEBP",
        save_all=True,
        append_images=frames[1:],
        duration=[round(1000 * some) for some in seconds],
        loop=0,
        lossless=True,
        quality=0,
        method=1,
        # No key frames: they only help seeking, and the encoder would try each frame both ways.
        kmin=0,
        kmax=0,
    )
    return file.getvalue()
