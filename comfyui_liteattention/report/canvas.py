"""Drawing with Pillow alone, which every ComfyUI has: a canvas, two themes, axis ticks."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]  # left, top, right, bottom
Point = tuple[float, float]

# Drawn this many times larger and reduced at the end, because Pillow's lines have jagged edges.
SHARP = 2


@dataclass(frozen=True)
class Theme:
    """Colours. ``ramp`` goes from 0 (skipped) to 1 (computed), with steadily changing lightness."""

    background: Colour
    panel: Colour
    ink: Colour
    faint: Colour
    accent: Colour
    second: Colour
    ramp: tuple[Colour, ...]


THEMES = {
    "dark": Theme(
        background=(20, 22, 29),
        panel=(29, 32, 42),
        ink=(232, 235, 242),
        faint=(151, 158, 174),
        accent=(247, 164, 64),
        second=(96, 178, 255),
        ramp=((33, 38, 56), (84, 47, 110), (176, 66, 98), (240, 137, 61), (255, 226, 148)),
    ),
    "light": Theme(
        background=(255, 255, 255),
        panel=(243, 244, 247),
        ink=(28, 31, 40),
        faint=(104, 110, 124),
        accent=(214, 116, 20),
        second=(31, 108, 196),
        ramp=((238, 239, 243), (255, 212, 138), (240, 137, 61), (176, 58, 92), (66, 28, 92)),
    ),
}


class Canvas:
    """One picture, ``size`` pixels; all coordinates and font sizes are in these pixels."""

    def __init__(self, theme: Theme, size: tuple[int, int]) -> None:
        self.theme = theme
        self.size = size
        width, height = size
        self._paint(Image.new("RGB", (width * SHARP, height * SHARP), theme.background))

    def copy(self) -> Canvas:
        """An independent canvas with the same content."""
        other = copy.copy(self)
        other._paint(self._image.copy())
        return other

    def text(
        self, at: Point, text: str, size: int = 24, colour: Colour | None = None, anchor: str = "la"
    ) -> None:
        """``anchor`` as in Pillow: l, m, r and a (top), m (middle), s (baseline)."""
        colour = colour or self.theme.ink
        x, y = _scaled(at)
        self._draw.text((x, y), text, fill=colour, font=font(size * SHARP), anchor=anchor)

    def box(self, box: Box, colour: Colour) -> None:
        left, top, right, bottom = _scaled(box)
        # Pillow includes the last pixel.
        self._draw.rectangle(
            (left, top, max(right - 1, left), max(bottom - 1, top)), fill=colour, width=0
        )

    def line(self, points: Sequence[Point], colour: Colour, width: float = 2) -> None:
        flat = [_scaled(point) for point in points]
        self._draw.line(flat, fill=colour, width=round(width * SHARP), joint="curve")

    def dot(self, at: Point, colour: Colour, radius: float = 4) -> None:
        x, y = at
        corners = _scaled((x - radius, y - radius, x + radius, y + radius))
        self._draw.ellipse(corners, fill=colour)

    def shares(self, share: np.ndarray, box: Box) -> None:
        """``[rows, columns]`` 0..1 in the colours of the ramp, stretched over the box.

        Cells stay sharp when enlarged and are averaged when reduced. NaN: nothing to show.
        """
        left, top, right, bottom = _scaled(box)
        area = (right - left, bottom - top)
        cells = Image.fromarray(share.astype(np.float32))
        if share.shape[1] > area[0] or share.shape[0] > area[1]:
            # Averaged as shares, not as colours: the ramp is not linear.
            cells = cells.resize(area, Image.Resampling.BOX)
        coloured = Image.fromarray(ramp_colours(self.theme, np.asarray(cells)))
        self._image.paste(coloured.resize(area, Image.Resampling.NEAREST), (left, top))

    def image(self) -> Image.Image:
        return self._image.reduce(SHARP)

    def tensor(self) -> Tensor:
        """The picture as ``[H, W, 3]`` float32 0..1."""
        return torch.from_numpy(np.asarray(self.image(), dtype=np.float32) / 255)

    def _paint(self, image: Image.Image) -> None:
        self._image = image
        self._draw = ImageDraw.Draw(image)


def ramp_colours(theme: Theme, share: np.ndarray) -> np.ndarray:
    """``[...]`` 0..1 -> ``[..., 3]`` uint8; NaN becomes the colour of an empty panel."""
    missing = np.isnan(share)
    colours = _ramp_table(theme)[np.where(missing, 0, share * 255).round().astype(np.uint8)]
    colours[missing] = theme.panel
    return colours


@lru_cache
def _ramp_table(theme: Theme) -> np.ndarray:
    """The colours of 0, 1 / 255, ... 1: ``[256, 3]`` uint8."""
    stops = np.linspace(0, 255, len(theme.ramp))
    channels = [np.interp(range(256), stops, levels) for levels in zip(*theme.ramp, strict=True)]
    return np.stack(channels, -1).round().astype(np.uint8)


def ticks(upper: float, at_most: int = 4) -> list[float]:
    """Round numbers from 0 to the first one that is not below ``upper`` (> 0)."""
    step = 10 ** math.floor(math.log10(upper / at_most))
    while step * at_most < upper * (1 - 1e-9):
        # 1, 2, 5, 10, 20, 50, ...
        step *= 2.5 if f"{step:e}".startswith("2") else 2
    return [i * step for i in range(math.ceil(upper / step * (1 - 1e-9)) + 1)]


def labelled(count: int, at_most: int) -> range:
    """Which of ``count`` rows to label: every n-th one from 0, with n a round number."""
    distance = 1
    while -(-count // distance) > at_most:
        distance = int(distance * (2.5 if str(distance).startswith("2") else 2))
    return range(0, count, distance)


def fit(text: str, width: float, size: int) -> int:
    """The largest font size up to ``size`` at which the text is no wider than ``width``."""
    length = font(size).getlength(text)
    return size if length <= width else max(1, int(size * width / length))


@lru_cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's built-in font, which needs no font file but covers only Latin-1."""
    return ImageFont.load_default(size)


def _scaled(values: Sequence[float]) -> tuple[int, ...]:
    return tuple(round(value * SHARP) for value in values)
