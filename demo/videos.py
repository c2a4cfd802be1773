"""Procedural training videos: one or two coloured shapes that move over a soft dark gradient.

A `Scene` is the batch of numbers behind the pictures; `render` turns it into pixels with analytic
anti-aliasing. Sizes and speeds are in pixels, not in shares of the frame, so that a 32 px video
looks like a crop of a 64 px one and what is learned on short sequences holds on long ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.95, -0.80, -0.80),
    "green": (-0.80, 0.75, -0.70),
    "blue": (-0.75, -0.45, 1.00),
    "yellow": (0.95, 0.85, -0.80),
    "cyan": (-0.75, 0.85, 0.90),
    "magenta": (0.90, -0.75, 0.85),
    "orange": (1.00, 0.10, -0.85),
    "white": (0.95, 0.95, 0.95),
}
SHAPES = ("circle", "square", "triangle", "cross")
_D = math.sqrt(0.5)
DIRECTIONS: dict[str, tuple[float, float]] = {  # (x, y), y grows downwards
    "right": (1.0, 0.0),
    "left": (-1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
    "up-right": (_D, -_D),
    "up-left": (-_D, -_D),
    "down-right": (_D, _D),
    "down-left": (-_D, _D),
}
MAX_SHAPES = 2


@dataclass(frozen=True)
class Scene:
    """B videos of up to two shapes; every field has B rows. Lengths in pixels, time in frames."""

    count: torch.Tensor  # [B] int, 1 or 2: shapes that are drawn and named in the text
    colour: torch.Tensor  # [B, 2] int, index into COLOURS
    shape: torch.Tensor  # [B, 2] int, index into SHAPES
    direction: torch.Tensor  # [B, 2] int, index into DIRECTIONS
    centre: torch.Tensor  # [B, 2, 2] float, (x, y) at the middle of the clip
    speed: torch.Tensor  # [B, 2] float, pixels per frame
    radius: torch.Tensor  # [B, 2] float
    ground: torch.Tensor  # [B, 2, 3] float, the two colours of the gradient
    angle: torch.Tensor  # [B] float, direction of the gradient, radians


def draw_scene(
    batch: int, height: int, width: int, generator: torch.Generator, two_shapes: float = 0.5
) -> Scene:
    """Random scenes for frames of height x width pixels; `two_shapes` is the chance of a second."""

    def uniform(*shape: int, low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    def pick(options: int) -> torch.Tensor:
        return torch.randint(options, (batch, MAX_SHAPES), generator=generator)

    size = torch.tensor([width, height], dtype=torch.float32)
    first = uniform(batch, 2, low=0.3, high=0.7) * size
    # The second shape starts from the opposite side of the centre, or both would often coincide.
    second = size - first + uniform(batch, 2, low=-0.12, high=0.12) * size
    spread = torch.where(first > size / 2, -0.12, 0.12) * size
    count = 1 + (torch.rand(batch, generator=generator) < two_shapes).long()
    pair = torch.stack([first - spread, second + spread], 1)
    centre = torch.where((count == 2)[:, None, None], pair, torch.stack([first, second], 1))
    return Scene(
        count=count,
        colour=pick(len(COLOURS)),
        shape=pick(len(SHAPES)),
        direction=pick(len(DIRECTIONS)),
        centre=centre,
        speed=uniform(batch, MAX_SHAPES, low=1.4, high=2.4),
        radius=uniform(batch, MAX_SHAPES, low=6.5, high=9.0),
        ground=uniform(batch, 2, 3, low=-0.95, high=-0.35),
        angle=uniform(batch, low=0.0, high=2 * math.pi),
    )


def signed_distance(x: torch.Tensor, y: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Approximate signed distances (pixels, negative inside) of all SHAPES: [len(SHAPES), ...].

    x and y are offsets from the shape's centre. Areas are kept roughly equal between the shapes.
    """
    circle = (x * x + y * y).sqrt() - radius
    square = torch.maximum(x.abs(), y.abs()) - 0.88 * radius
    slope = math.sqrt(3) / 2
    triangle = torch.maximum(slope * x.abs() - 0.5 * (y - 0.2 * radius), y - 0.2 * radius)
    triangle = triangle - 0.62 * radius
    arm, thick = 1.1 * radius, 0.4 * radius
    upright = torch.maximum(x.abs() - thick, y.abs() - arm)
    level = torch.maximum(x.abs() - arm, y.abs() - thick)
    return torch.stack([circle, square, triangle, torch.minimum(upright, level)])


def render(scene: Scene, frames: int, height: int, width: int) -> torch.Tensor:
    """Scene of B videos -> pixels [B, 3, frames, height, width] in [-1, 1], float32."""
    batch = scene.count.shape[0]
    palette = torch.tensor(list(COLOURS.values()))
    vectors = torch.tensor(list(DIRECTIONS.values()))
    ys = torch.arange(height).view(1, 1, height, 1) + 0.5
    xs = torch.arange(width).view(1, 1, 1, width) + 0.5
    times = (torch.arange(frames) - (frames - 1) / 2).view(1, frames, 1, 1)

    angle = scene.angle.view(batch, 1, 1, 1)
    along = angle.cos() * (xs / width - 0.5) + angle.sin() * (ys / height - 0.5)
    share = (0.5 + along / math.sqrt(2)).clamp(0, 1)[:, None]  # [B, 1, 1, H, W]
    dark, light = (scene.ground[:, i].view(batch, 3, 1, 1, 1) for i in range(2))
    video = (dark + (light - dark) * share).expand(batch, 3, frames, height, width)

    for i in range(MAX_SHAPES):
        velocity = vectors[scene.direction[:, i]] * scene.speed[:, i, None]  # [B, 2]
        x0, y0 = (scene.centre[:, i, axis].view(batch, 1, 1, 1) for axis in range(2))
        vx, vy = (velocity[:, axis].view(batch, 1, 1, 1) for axis in range(2))
        radius = scene.radius[:, i].view(batch, 1, 1, 1)
        distances = signed_distance(xs - x0 - vx * times, ys - y0 - vy * times, radius)
        chosen = scene.shape[:, i].view(1, batch, 1, 1, 1)
        distance = distances.gather(0, chosen.expand(1, *distances.shape[1:]))[0]
        cover = (0.5 - distance).clamp(0, 1) * (scene.count > i).view(batch, 1, 1, 1)
        colour = palette[scene.colour[:, i]].view(batch, 3, 1, 1, 1)
        video = video + (colour - video) * cover[:, None]
    return video
