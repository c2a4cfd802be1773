"""Pictures of a run, as ComfyUI images ``[1, H, W, 3]`` float 0..1."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .report import MapStats

SIDE = 256  # pixels of one map
MARGIN = 12
CAPTION = 28
BACKGROUND = (16, 18, 24)
TEXT = (222, 226, 234)
DEAD = np.array((30, 34, 46), dtype=np.float32)
LIVE = np.array((255, 190, 80), dtype=np.float32)


def tile_map_image(maps: Sequence[MapStats], columns: int = 4) -> Tensor:
    """The final tile maps side by side: x key tiles, y query tiles, bright where computed."""
    if not maps:
        return _to_tensor(_note("No tile map: see the report."))
    columns = min(columns, len(maps))
    rows = -(-len(maps) // columns)
    cell_w, cell_h = SIDE + MARGIN, SIDE + CAPTION + MARGIN
    canvas = Image.new("RGB", (columns * cell_w + MARGIN, rows * cell_h + MARGIN), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for i, one in enumerate(maps):
        x = MARGIN + i % columns * cell_w
        y = MARGIN + i // columns * cell_h
        layer = f"layer {one.layer}" if one.layer.isdecimal() else one.layer
        caption = f"{layer} {one.stream}: {float(one.live.mean()):.0%}"
        draw.text((x, y), caption, fill=TEXT, font=_font())
        canvas.paste(_colour(one.live), (x, y + CAPTION))
    return _to_tensor(canvas)


def _colour(live: Tensor) -> Image.Image:
    """``[Tq, Tk]`` 0..1 -> a square picture; nearest when enlarged, averaged when reduced."""
    share = live.numpy()[..., None]
    pixels = (DEAD + (LIVE - DEAD) * share).round().astype(np.uint8)
    small = max(live.shape) <= SIDE
    method = Image.Resampling.NEAREST if small else Image.Resampling.BOX
    return Image.fromarray(pixels).resize((SIDE, SIDE), method)


def _note(text: str) -> Image.Image:
    canvas = Image.new("RGB", (SIDE * 2, 64), BACKGROUND)
    ImageDraw.Draw(canvas).text((MARGIN, 20), text, fill=TEXT, font=_font())
    return canvas


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=20)


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).unsqueeze(0)
