"""What a video shows, seen by plain means: no network, nothing learned.

A shape is found by its colour (pixels whose hue is nearest to it) and by a template that is moved
over every frame: where the two agree best is the place, and the template that agrees best over all
frames is the shape. A line through the places gives the direction. Pixels of the other shape are
left out of the comparison, since it may hide this one.

`judge` says which clauses of a prompt a video shows, and where its ground drifts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import torch
from torch.nn import functional

from .text import GROUND_SLOT, PAD, SLOTS_PER_CLAUSE, WORDS, parse_prompt
from .videos import COLOURS, DIRECTIONS, DRIFT, RADIUS, SHAPES, held_out, signed_distance

RADII = (RADIUS[0], sum(RADIUS) / 2, RADIUS[1])  # of the templates
T = TypeVar("T")

HALF = 2  # templates are moved over pictures of half the size
MARGIN = 12  # half-size pixels by which a template's centre may be outside of the picture
LEAST_VISIBLE = 0.45  # share of a template that has to be in sight for a frame to count
LEAST_FRAMES = 0.4  # share of the frames that have to count
LEAST_AGREEMENT = 0.55  # mean overlap (intersection over union) of pixels and template
LEAST_SPEED = 1.0  # pixels per frame
BRIGHT, SAME_HUE = 0.0, 0.94  # brightest channel and cosine of pixels that belong to a colour


@dataclass(frozen=True)
class Seen:
    """A shape of one colour, over the frames that count."""

    shape: str
    agreement: float  # mean overlap with the best template
    direction: str
    speed: float  # pixels per frame
    frames: int  # how many count


@dataclass(frozen=True)
class Verdict:
    """How far a video shows its prompt; an entry per clause."""

    colours: tuple[bool, ...]
    shapes: tuple[bool, ...]
    directions: tuple[bool, ...]
    ground: bool | None  # whether it drifts as asked; None: not asked

    @property
    def all_right(self) -> bool:
        """Every clause has its colour, shape and direction."""
        return all((*self.colours, *self.shapes, *self.directions))


def colour_masks(video: torch.Tensor) -> torch.Tensor:
    """Video [3, F, H, W] in [-1, 1] -> bool [8, F, H, W], the pixels of every colour of COLOURS."""
    palette = functional.normalize(torch.tensor(list(COLOURS.values())) + 1, dim=1)
    light = video.float().clamp(-1, 1) + 1
    hue = functional.normalize(light, dim=0)
    likeness = torch.einsum("kc,cfyx->kfyx", palette, hue)
    best = likeness.argmax(0)
    coloured = (likeness.amax(0) > SAME_HUE) & (light.amax(0) > 1 + BRIGHT)
    return (torch.arange(len(palette)).view(-1, 1, 1, 1) == best) & coloured


@lru_cache(maxsize=4)
def _templates(size: int) -> torch.Tensor:
    """Fourier transforms of all shapes and radii around (0, 0): [shapes, radii, size, size]."""
    axis = torch.arange(size, dtype=torch.float32)
    axis = torch.where(axis > size / 2, axis - size, axis) * HALF
    y, x = axis[:, None].expand(size, size), axis[None].expand(size, size)
    drawn = [
        torch.stack([(signed_distance(shape, x, y, torch.tensor(r)) < 0).float() for r in RADII])
        for shape in SHAPES
    ]
    return torch.fft.rfft2(torch.stack(drawn))


def see(mask: torch.Tensor, visible: torch.Tensor) -> Seen | None:
    """The shape in a colour's pixels [F, H, W]; only `visible` [F, H, W] pixels are looked at."""
    mask, visible = (functional.avg_pool2d(x.float(), HALF) for x in (mask & visible, visible))
    frames, height, width = mask.shape
    size = 2 * max(height, width)
    templates = _templates(size)
    area = torch.fft.irfft2(templates, s=(size, size)).sum((-1, -2))[None, :, :, None, None]

    def correlate(picture: torch.Tensor) -> torch.Tensor:
        """Sum of the pixels under every template at every place: [F, shapes, radii, Y, X]."""
        padded = torch.zeros(frames, size, size)
        padded[:, MARGIN : MARGIN + height, MARGIN : MARGIN + width] = picture
        found = torch.fft.irfft2(
            torch.fft.rfft2(padded)[:, None, None] * templates.conj(), s=(size, size)
        )
        return found[..., : height + 2 * MARGIN, : width + 2 * MARGIN]

    inside, in_sight = correlate(mask), correlate(visible)
    union = mask.sum((1, 2)).view(-1, 1, 1, 1, 1) + in_sight - inside
    overlap = (inside / union.clamp(min=1)).where(in_sight > LEAST_VISIBLE * area, 0.0)
    best, at = overlap.flatten(-2).max(-1)  # [F, shapes, radii]
    counted = best.amax((1, 2)) > 0.25
    if counted.float().mean() < LEAST_FRAMES:
        return None
    per_template = best[counted].mean(0)  # one shape and size for the whole video
    shape, radius = divmod(int(per_template.argmax()), len(RADII))
    place = at[counted, shape, radius]
    columns = width + 2 * MARGIN
    places = torch.stack([place % columns, place // columns], -1).float()
    velocity = HALF * _slope(
        torch.arange(frames)[counted].float(), places, best[counted, shape, radius]
    )
    return Seen(
        shape=SHAPES[shape],
        agreement=float(per_template.max()),
        direction=nearest_direction(velocity),
        speed=float(velocity.norm()),
        frames=int(counted.sum()),
    )


def _slope(times: torch.Tensor, places: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Change of places [F, 2] per frame: the line that fits best."""
    weight = weight / weight.sum()
    times = times - (weight * times).sum()
    places = places - (weight[:, None] * places).sum(0)
    spread = (weight * times * times).sum().clamp(min=1e-6)
    return (weight[:, None] * times[:, None] * places).sum(0) / spread


def nearest_direction(velocity: torch.Tensor) -> str:
    """The word for a velocity [2] (x, y)."""
    likeness = torch.tensor(list(DIRECTIONS.values())) @ velocity
    return list(DIRECTIONS)[int(likeness.argmax())]


def ground_drift(video: torch.Tensor, shapes: torch.Tensor) -> str:
    """Where the ground of a video [3, F, H, W] drifts; `shapes` [F, H, W]: pixels to leave out."""
    grey = video.float().mean(0)
    grown = functional.max_pool2d(shapes.float()[:, None], 7, 1, 3)[:, 0] > 0
    errors = {}
    for word, (dx, dy) in DIRECTIONS.items():
        for speed in range(math.floor(DRIFT[0]), math.ceil(DRIFT[1]) + 1):
            shift = (round(dy * speed), round(dx * speed))
            before, after = _overlapping(grey, shift)
            hidden = torch.logical_or(*_overlapping(grown, shift))
            square = (before - after).square()[~hidden]
            errors[word, speed] = float(square.mean()) if len(square) else math.inf
    return min(errors, key=lambda key: errors[key])[0]


def _overlapping(x: torch.Tensor, shift: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The parts of x[:-1] and x[1:] ([F, H, W]) that meet when the first moves by (dy, dx)."""
    before, after = x[:-1], x[1:]
    for axis, by in zip((1, 2), shift, strict=True):
        length = x.shape[axis] - abs(by)
        before = before.narrow(axis, max(-by, 0), length)
        after = after.narrow(axis, max(by, 0), length)
    return before, after


def judge(video: torch.Tensor, prompt: str) -> Verdict:
    """Whether a video [3, F, H, W] in [-1, 1] shows what the prompt says; colours must differ."""
    slots = [WORDS[index] for index in parse_prompt(prompt)]
    starts = [s for s in (0, SLOTS_PER_CLAUSE) if slots[s] != PAD]
    masks = colour_masks(video)
    colours = list(COLOURS)
    found = []
    for start in starts:
        colour, shape, direction = slots[start : start + 3]
        others = [masks[colours.index(slots[s])] for s in starts if s != start]
        hidden = torch.stack(others).any(0) if others else torch.zeros_like(masks[0])
        seen = see(masks[colours.index(colour)], ~hidden)
        if seen is None or seen.agreement < LEAST_AGREEMENT:
            found.append((False, False, False))
            continue
        moves = seen.speed >= LEAST_SPEED and seen.direction == direction
        found.append((True, seen.shape == shape, moves))
    there, shaped, moving = zip(*found, strict=True)
    ground = slots[GROUND_SLOT]
    drifts = None if ground == PAD else ground_drift(video, masks.any(0)) == ground
    return Verdict(there, shaped, moving, drifts)


def held_out_prompts(count: int, seed: int = 0) -> list[str]:
    """Prompts whose clauses training never drew, two in five with one clause; colours differ."""
    generator = torch.Generator().manual_seed(seed)

    def pick(options: Sequence[T]) -> T:
        return options[int(torch.randint(len(options), (), generator=generator))]

    clauses = [
        (colour, shape, direction)
        for c, colour in enumerate(COLOURS)
        for s, shape in enumerate(SHAPES)
        for d, direction in enumerate(DIRECTIONS)
        if held_out(torch.tensor(c), torch.tensor(s), torch.tensor(d))
    ]
    prompts: list[str] = []
    while len(prompts) < count:
        first, second = pick(clauses), pick(clauses)
        if first[0] == second[0]:
            continue
        named = (first,) if len(prompts) % 5 < 2 else (first, second)
        text = " and ".join(f"{c} {s} moving {d}" for c, s, d in named)
        if len(prompts) % 2:
            text += f" over ground drifting {pick(list(DIRECTIONS))}"
        if text not in prompts:
            prompts.append(text)
    return prompts
