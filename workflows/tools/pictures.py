"""Make the pictures of the docs and of the template browser anew, after a run of the demo:

    python dev.py demo
    python -m workflows.tools.pictures demo_out

Frames with and without LiteAttention, the heat map and the tile maps go to ``docs/images``; from
the frames thumbnails are drawn (thumbnails.py). What the run was is recorded in the picture of the
frames. The picture of the workflow needs a browser: ``tests/environment/browser.py --picture``.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from demo.compare import read_video

from . import thumbnails
from .thumbnails import FRAMES, GAP, SIDE

COLUMNS = 6
#: Of the figures of a run, those that don't depend on the machine's speed.
RECORDED = ("preset", "steps", "seed", "tokens", "computed_fraction", "psnr_db", "backend")


def main() -> None:
    parser = argparse.ArgumentParser(prog="pictures", description=__doc__)
    parser.add_argument("folder", type=Path, help="what `python dev.py demo` has written")
    folder: Path = parser.parse_args().folder
    figures = json.loads((folder / "figures.json").read_text())
    save_frames(folder, {name: figures[name] for name in RECORDED})
    for name in ("heat_map", "tile_map"):
        shutil.copy(folder / f"{name}.png", FRAMES.parent)
    thumbnails.main()


def save_frames(folder: Path, run: dict[str, Any]) -> None:
    """Some frames of both videos, dense above; ``run`` goes into the file."""
    rows = [
        [_square(frame) for frame in _some(read_video(folder / f"{name}.webp").numpy())]
        for name in ("dense", "lite")
    ]
    step = SIDE + GAP
    sheet = Image.new("RGB", (COLUMNS * step - GAP, 2 * step - GAP), "white")
    for row, frames in enumerate(rows):
        for column, frame in enumerate(frames):
            sheet.paste(frame, (column * step, row * step))
    info = PngInfo()
    info.add_text("run", json.dumps(run))
    sheet.save(FRAMES, optimize=True, pnginfo=info)


def _some(video: np.ndarray) -> np.ndarray:
    """``[COLUMNS, H, W, 3]`` of ``[frames, H, W, 3]``, from the first to the last."""
    return video[np.linspace(0, len(video) - 1, COLUMNS).round().astype(int)]


def _square(frame: np.ndarray) -> Image.Image:
    image = Image.fromarray((frame * 255).round().astype(np.uint8))
    return image.resize((SIDE, SIDE), Image.Resampling.NEAREST)


if __name__ == "__main__":
    main()
