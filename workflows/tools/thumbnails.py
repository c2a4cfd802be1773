"""Draw the thumbnails of the template browser: what one will get, dense, with LiteAttention, and
their difference.

    python -m workflows.tools.thumbnails

Our machines can't run the large models, so the frames are those of the demo's small model, and
every picture says so. The run that made them is recorded beside the frames (pictures.py), and which
frames were drawn, in the picture (a comment of the JPEG); tests compare both with the workflow.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
from PIL import Image

from comfyui_liteattention.report.canvas import THEMES, Canvas, fit

from .make_workflows import DEMO, FOLDER, RECIPES, REPOSITORY

FRAMES = REPOSITORY / "docs" / "images" / "dense_and_lite.png"  # dense above, LiteAttention below
SIDE, GAP = 256, 6  # pixels of a frame there, and between two
FRAME = 4  # which one
AMPLIFIED = 8
SIZE = (400, 300)
PANEL, LEFT, TOP = 120, 14, 112
PLACES = tuple(LEFT + k * (PANEL + 6) for k in range(3))
TITLES = {
    DEMO: "Demo: a small model of our own",
    f"{DEMO}_ab": "Demo: with and without",
    DEMO.replace("_demo", "_threshold"): "Demo: a fixed threshold",
}


def main() -> None:
    titles = {str(FOLDER / f"liteattention_{r.name}"): r.title for r in RECIPES}
    titles |= {str(REPOSITORY / name): title for name, title in TITLES.items()}
    for name, title in titles.items():
        draw(title).save(f"{name}.jpg", quality=88, comment=json.dumps(record(title)).encode())


def record(title: str) -> dict[str, Any]:
    digest = hashlib.sha256(FRAMES.read_bytes()).hexdigest()
    return {"title": title, "frames": FRAMES.name, "sha256": digest}


def recorded_run() -> dict[str, Any]:
    """The run of the demo that made the frames: some of its figures."""
    with Image.open(FRAMES) as frames:
        return json.loads(frames.info["run"])


def draw(title: str) -> Image.Image:
    theme, panels, run = THEMES["dark"], _frames(), recorded_run()
    canvas = Canvas(theme, SIZE)
    canvas.text((LEFT, 44), title, fit(title, SIZE[0] - 2 * LEFT, 25), theme.ink, "ls")
    canvas.text((LEFT, 72), "with LiteAttention, last before the sampler", 17, theme.accent, "ls")
    for x, (label, _) in zip(PLACES, panels, strict=True):
        canvas.text((x + PANEL / 2, TOP - 8), label, 15, theme.faint, "ms")
    tiles = f"{run['computed_fraction']:.0%} of the tiles computed"
    lines = (
        f"Frames: our small demo model, {run['steps']} steps.",
        f"{run['preset']}: {tiles}, {run['psnr_db']:.0f} dB",
    )
    for y, text in zip((258, 280), lines, strict=True):
        canvas.text((LEFT, y), text, 15, anchor="ls")
    page = canvas.image()
    for x, (_, frame) in zip(PLACES, panels, strict=True):
        panel = Image.fromarray(frame).resize((PANEL, PANEL), Image.Resampling.NEAREST)
        page.paste(panel, (x, TOP))
    return page


def _frames() -> list[tuple[str, np.ndarray]]:
    """Label and pixels ``[H, W, 3]`` uint8 of the three panels."""
    sheet = np.asarray(Image.open(FRAMES).convert("RGB"))
    left = FRAME * (SIDE + GAP)
    dense, lite = (sheet[top : top + SIDE, left : left + SIDE] for top in (0, SIDE + GAP))
    apart = np.abs(dense.astype(int) - lite.astype(int)) * AMPLIFIED
    return [
        ("dense", dense),
        ("LiteAttention", lite),
        (f"difference x {AMPLIFIED}", apart.clip(0, 255).astype(np.uint8)),
    ]


if __name__ == "__main__":
    main()
