"""Procedural training videos: one or two coloured shapes that cross a mottled, drifting ground.

A `Scene` is the batch of numbers behind the pictures; `render` turns it into pixels with analytic
anti-aliasing. The ground and the skin of every shape are noise that moves with them and that no
prompt names. So what a token of one frame has to look like is written only where the same piece of
ground or shape is seen in other frames: content decides where attention has to go.

Lengths are in pixels, times in frames; time 0 is the middle of the clip.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn import functional

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
PIXELS, FRAMES = 128, 16  # of the training clips
RADIUS = (21.0, 26.0)
SPEED = (3.5, 5.5)  # of the shapes, pixels per frame
DRIFT = (4.0, 8.0)  # of the ground
GROUND_CELL, SKIN_CELL = 14.0, 11.0  # pixels between two random values of ground and skin
GROUND_FIELD, SKIN_FIELD = 28, 8  # random values on each side of their fields
SHADE = 0.45  # how much darker the darkest spot of a skin is than its colour
LEAST_APART = 0.6  # mean distance of two shapes over the clip, in sums of their radii
TRIES = 6  # places drawn for two shapes, of which the first far enough apart is taken


@dataclass(frozen=True)
class Scene:
    """B videos; every field has B rows."""

    count: torch.Tensor  # [B] int, 1 or 2: shapes that are drawn and named in the text
    colour: torch.Tensor  # [B, 2] int, index into COLOURS
    shape: torch.Tensor  # [B, 2] int, index into SHAPES
    direction: torch.Tensor  # [B, 2] int, index into DIRECTIONS
    centre: torch.Tensor  # [B, 2, 2] float, (x, y) at time 0
    speed: torch.Tensor  # [B, 2] float
    radius: torch.Tensor  # [B, 2] float
    skin: torch.Tensor  # [B, 2, SKIN_FIELD, SKIN_FIELD] float, 0 or 1
    drift: torch.Tensor  # [B] int, index into DIRECTIONS: where the ground goes
    drift_named: torch.Tensor  # [B] bool, whether the text says so
    drift_speed: torch.Tensor  # [B] float
    ground: torch.Tensor  # [B, GROUND_FIELD, GROUND_FIELD] float, 0 or 1
    tints: torch.Tensor  # [B, 2, 3] float, the two colours between which the ground varies


def held_out(colour: torch.Tensor, shape: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """True for the 32 of 256 clauses that training never draws (indices of any equal shape)."""
    return (direction + 2 * shape + 3 * colour) % 8 == 0


def draw_scene(
    batch: int,
    generator: torch.Generator,
    two_shapes: float = 0.6,
    named_drift: float = 0.5,
    pixels: int = PIXELS,
) -> Scene:
    """Random scenes, none with a held-out clause; `two_shapes` and `named_drift` are chances."""

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    def pick(*shape: int, options: int) -> torch.Tensor:
        return torch.randint(options, shape, generator=generator)

    colour = pick(batch, MAX_SHAPES, options=len(COLOURS))
    shape = pick(batch, MAX_SHAPES, options=len(SHAPES))
    direction = pick(batch, MAX_SHAPES, options=len(DIRECTIONS))
    # A neighbouring direction instead of a held-out one: directions then stay almost even.
    turned = (direction + 1 + pick(batch, MAX_SHAPES, options=7)) % 8
    direction = torch.where(held_out(colour, shape, direction), turned, direction)
    speed = uniform(batch, MAX_SHAPES, low=SPEED[0], high=SPEED[1])
    radius = uniform(batch, MAX_SHAPES, low=RADIUS[0], high=RADIUS[1])
    velocity = torch.tensor(list(DIRECTIONS.values()))[direction] * speed[..., None]
    places = uniform(batch, TRIES, MAX_SHAPES, 2, low=0.25, high=0.75) * pixels
    tint = uniform(batch, 1, 3, low=-0.08, high=0.08) + uniform(batch, 2, 3, low=-0.06, high=0.06)
    return Scene(
        count=1 + (uniform(batch) < two_shapes).long(),
        colour=colour,
        shape=shape,
        direction=direction,
        centre=_apart(places, velocity, radius),
        speed=speed,
        radius=radius,
        skin=uniform(batch, MAX_SHAPES, SKIN_FIELD, SKIN_FIELD).round(),
        drift=pick(batch, options=len(DIRECTIONS)),
        drift_named=uniform(batch) < named_drift,
        drift_speed=uniform(batch, low=DRIFT[0], high=DRIFT[1]),
        ground=uniform(batch, GROUND_FIELD, GROUND_FIELD).round(),
        tints=torch.tensor([-0.95, -0.4]).view(1, 2, 1) + tint,
    )


def _apart(places: torch.Tensor, velocity: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Of places [B, TRIES, 2, 2], for each video the first at which the shapes keep apart enough.

    They may well pass in front of one another, but not cover one another for most of the clip.
    """
    times = clip_times(FRAMES).view(-1, 1)
    gap = (places[:, :, 0] - places[:, :, 1])[:, :, None]  # [B, TRIES, 1, 2]
    closing = (velocity[:, 0] - velocity[:, 1])[:, None, None]  # [B, 1, 1, 2]
    distance = (gap + closing * times).norm(dim=-1) / radius.sum(-1)[:, None, None]
    enough = distance.clamp(max=1).mean(-1) >= LEAST_APART  # [B, TRIES]
    chosen = torch.where(enough.any(1), enough.int().argmax(1), distance.mean(-1).argmax(1))
    return places[torch.arange(len(places)), chosen]


def clip_times(frames: int) -> torch.Tensor:
    """Times of the frames of a whole clip: [frames] float, 0 in the middle."""
    return torch.arange(frames) - (frames - 1) / 2


def signed_distance(
    shape: str, x: torch.Tensor, y: torch.Tensor, radius: torch.Tensor
) -> torch.Tensor:
    """Approximate signed distance (pixels, negative inside) from a shape's edge.

    x and y are offsets from the shape's centre. Areas are kept roughly equal between the shapes.
    """
    if shape == "circle":
        return (x * x + y * y).sqrt() - radius
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.88 * radius
    if shape == "triangle":
        below = y - 0.2 * radius
        return torch.maximum(math.sqrt(3) / 2 * x.abs() - 0.5 * below, below) - 0.62 * radius
    arm, thick = 1.1 * radius, 0.4 * radius
    upright = torch.maximum(x.abs() - thick, y.abs() - arm)
    level = torch.maximum(x.abs() - arm, y.abs() - thick)
    return torch.minimum(upright, level)


def render(scene: Scene, times: torch.Tensor, pixels: int = PIXELS) -> torch.Tensor:
    """Scene of B videos -> pictures [B, 3, F, pixels, pixels] in [-1, 1] at `times` [F]."""
    batch, frames = len(scene.count), len(times)
    palette = torch.tensor(list(COLOURS.values()))
    vectors = torch.tensor(list(DIRECTIONS.values()))
    ys = torch.arange(pixels).view(1, 1, pixels, 1) + 0.5
    xs = torch.arange(pixels).view(1, 1, 1, pixels) + 0.5
    moments = times.view(1, frames, 1, 1)

    def column(x: torch.Tensor) -> torch.Tensor:
        return x.view(batch, 1, 1, 1)

    shift = vectors[scene.drift] * scene.drift_speed[:, None]
    x = xs - pixels / 2 - column(shift[:, 0]) * moments
    y = ys - pixels / 2 - column(shift[:, 1]) * moments
    share = _noise(scene.ground, x / GROUND_CELL, y / GROUND_CELL)[:, None]
    dark, light = (scene.tints[:, i].view(batch, 3, 1, 1, 1) for i in range(2))
    video = dark + (light - dark) * share  # [B, 3, F, H, W]

    for i in range(MAX_SHAPES):  # the second passes in front of the first
        velocity = vectors[scene.direction[:, i]] * scene.speed[:, i, None]
        x = xs - column(scene.centre[:, i, 0]) - column(velocity[:, 0]) * moments
        y = ys - column(scene.centre[:, i, 1]) - column(velocity[:, 1]) * moments
        distance = _distances(scene.shape[:, i], x, y, column(scene.radius[:, i]))
        cover = (0.5 - distance).clamp(0, 1) * column(scene.count > i)
        light = 1 - SHADE * _noise(scene.skin[:, i], x / SKIN_CELL, y / SKIN_CELL)
        colour = palette[scene.colour[:, i]].view(batch, 3, 1, 1, 1)
        skin = (colour + 1) * light[:, None] - 1
        video = video + (skin - video) * cover[:, None]
    return video


def _distances(
    shape: torch.Tensor, x: torch.Tensor, y: torch.Tensor, radius: torch.Tensor
) -> torch.Tensor:
    """`signed_distance` of B videos with a shape each: [B, F, H, W]."""
    found = torch.empty(torch.broadcast_shapes(x.shape, y.shape))
    for index, name in enumerate(SHAPES):
        rows = shape == index
        found[rows] = signed_distance(name, x[rows], y[rows], radius[rows])
    return found


def _noise(field: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Smooth noise 0..1: field [B, S, S], its middle at 0, read at x and y [B, F, H, W] (cells)."""
    batch, frames, height, width = torch.broadcast_shapes(x.shape, y.shape)
    half = field.shape[-1] / 2
    grid = torch.stack(torch.broadcast_tensors(x / half, y / half), -1)
    read = functional.grid_sample(
        field[:, None],
        grid.reshape(batch, frames * height, width, 2),
        mode="bilinear",
        padding_mode="reflection",
        align_corners=False,
    )
    return read.view(batch, frames, height, width)
