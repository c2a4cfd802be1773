"""Pictures of a run, as ComfyUI images ``[N, H, W, 3]`` float 0..1, all of one size."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .canvas import THEMES, Box, Canvas, Colour, Theme, fit, labelled, ticks
from .confidence import Interval, of_steps
from .statistics import (
    CallStats,
    MapStats,
    RunReport,
    by,
    fraction,
    layer_labels,
    loss_intervals,
    mean_lost,
    saving,
    short_names,
)

SIZE = (960, 720)
MARGIN = 36
PAGE = 12  # maps on one picture
CELL = 16  # pixels; smaller cells are drawn without lines between them
LEFT, RIGHT = 104, SIZE[0] - MARGIN  # of the charts
TITLE, LABEL = 30, 22  # font sizes: still legible when the picture is as wide as a node


class Pictures(NamedTuple):
    """``maps [pages, H, W, 3]`` and ``charts [2, H, W, 3]``: steps x layers, then the steps."""

    maps: Tensor
    charts: Tensor


def pictures(report: RunReport | None, theme: str = "dark", note: str = "") -> Pictures:
    """All pictures of a run; where there is nothing to draw, ``note`` says why."""
    colours = THEMES[theme]
    if report is None or not report.calls:
        empty = note_image(note, colours)[None]
        return Pictures(empty, empty)
    charts = torch.stack([heat_map(report, colours), step_chart(report, colours)])
    maps = tile_maps(report.maps, colours) if report.maps else note_image(note, colours)[None]
    return Pictures(maps, charts)


def heat_map(report: RunReport, theme: Theme) -> Tensor:
    """Computed fraction over steps (right) and layers (down), ``[H, W, 3]``."""
    layers = by(report.calls, "layer")
    steps = sorted(by(report.calls, "step"))
    share = np.full((len(layers), len(steps)), np.nan)
    for row, calls in enumerate(layers.values()):
        for step, some in by(calls, "step").items():
            share[row, steps.index(step)] = fraction(some)

    canvas = _page(theme, "Tiles computed", f"{report.computed_fraction:.1%} of the attention")
    left, top, right, bottom = box = (LEFT, 116, RIGHT - 104, SIZE[1] - 76)
    canvas.shares(share, box)
    cell_w, cell_h = (right - left) / len(steps), (bottom - top) / len(layers)
    for i in range(1, len(steps) if cell_w >= CELL else 0):
        x = left + i * cell_w
        canvas.box((x - 0.5, top, x + 0.5, bottom), theme.background)
    for i in range(1, len(layers) if cell_h >= CELL else 0):
        y = top + i * cell_h
        canvas.box((left, y - 0.5, right, y + 0.5), theme.background)

    names = short_names(list(layers))
    for i in labelled(len(layers), 20):
        y = top + (i + 0.5) * cell_h
        size = fit(names[i], left - 16, LABEL)
        canvas.text((left - 12, y), names[i], size, theme.faint, "rm")
    canvas.text((left - 12, top - 10), "layer", LABEL, theme.ink, "rs")
    _step_labels(canvas, steps, left, right, bottom)
    _legend(canvas, (RIGHT - 76, top, RIGHT - 54, bottom))
    return canvas.tensor()


def step_chart(report: RunReport, theme: Theme) -> Tensor:
    """Computed fraction, lost mass and seconds over the steps, ``[H, W, 3]``."""
    groups = dict(sorted(by(report.calls, "step").items()))
    steps = list(groups)
    computed = [100 * fraction(calls) for calls in groups.values()]
    lost = [_percent(mean_lost(calls)) for calls in groups.values()]
    worst = [_percent(_worst_layer(calls)) for calls in groups.values()]
    allowed = [100 * report.allowed[step] for step in steps if step < len(report.allowed)]
    intervals = of_steps(loss_intervals(report))
    doubt = [intervals.get(step) for step in steps]
    seconds = [report.step_seconds.get(step) for step in steps]
    dense = [report.dense_seconds.get(step) for step in steps]

    saved = report.saved_seconds
    mean = report.lost_mass_mean
    measured = "not measured" if mean is None else f"mean {mean:.2%}"
    if report.lost_mass_allowed is not None:
        measured += f" of {report.lost_mass_allowed:.2%}"
    rows: list[tuple[str, str, Callable[[Box], None]]] = []
    canvas = _page(theme, "Step by step", f"{report.tokens:,} tokens, {report.backend} backend")
    rows.append(
        (
            "tiles computed, %",
            f"{report.computed_fraction:.1%} overall",
            lambda box: _bars(canvas, box, computed, theme.accent, 100),
        )
    )
    rows.append(
        (
            "lost mass, %   (thin: worst layer"
            + (", grey: allowed" if allowed else "")
            + (", bars: 95 %)" if intervals else ")"),
            measured,
            lambda box: _curves(canvas, box, lost, worst, allowed, doubt, theme.second),
        )
    )
    if any(second is not None for second in seconds):
        rows.append(
            (
                "seconds of the steps"
                + ("   (line: dense, estimated)" if report.dense_seconds else ""),
                f"{report.seconds:.1f} s in all" + ("" if saved is None else f", {saving(saved)}"),
                lambda box: _bars(canvas, box, seconds, theme.faint, beside=dense),
            )
        )
    top, bottom = 84, SIZE[1] - 64
    height = (bottom - top) / len(rows)
    for i, (title, figure, draw) in enumerate(rows):
        y = top + i * height
        canvas.text((LEFT, y + 32), title, LABEL, theme.ink, "ls")
        canvas.text((RIGHT, y + 32), figure, LABEL, theme.faint, "rs")
        draw((LEFT, y + 42, RIGHT, y + height - 12))
    _step_labels(canvas, steps, LEFT, RIGHT, bottom - 12)
    return canvas.tensor()


def tile_maps(maps: Sequence[MapStats], theme: Theme) -> Tensor:
    """The final map of every layer, ``[pages, H, W, 3]``: x key tiles, y query tiles.

    Conditionings are averaged as heads are: with context windows there may be dozens of them.
    """
    layers = by_layer(maps)
    pages = -(-len(layers) // PAGE)
    names = layer_labels([layer for layer, _ in layers])
    shares = [np.mean([live.numpy() for live in streams], 0) for streams in layers.values()]
    images = []
    for page in range(pages):
        part = slice(page * PAGE, (page + 1) * PAGE)
        count = f"   {page + 1} / {pages}" if pages > 1 else ""
        canvas = _map_page(theme, f"Tile maps{count}")
        _draw_maps(canvas, names[part], shares[part], min(len(layers), PAGE))
        images.append(canvas.tensor())
    return torch.stack(images)


def note_image(text: str, theme: Theme) -> Tensor:
    """A page that only says something, ``[H, W, 3]``."""
    canvas = Canvas(theme, SIZE)
    lines = textwrap.wrap(text, 56)
    for i, line in enumerate(lines):
        y = SIZE[1] / 2 + (i - len(lines) / 2 + 0.5) * 44
        canvas.text((SIZE[0] / 2, y), line, TITLE, theme.faint, "mm")
    return canvas.tensor()


def by_layer(maps: Sequence[MapStats]) -> dict[tuple[str, torch.Size], list[Tensor]]:
    """The maps of each layer (and size), one per stream, in order of first appearance."""
    groups: dict[tuple[str, torch.Size], list[Tensor]] = {}
    for one in maps:
        groups.setdefault((one.layer, one.live.shape), []).append(one.live)
    return groups


def _page(theme: Theme, title: str, subtitle: str) -> Canvas:
    canvas = Canvas(theme, SIZE)
    canvas.text((MARGIN, 62), title, TITLE, theme.ink, "ls")
    canvas.text((RIGHT, 62), subtitle, LABEL, theme.faint, "rs")
    return canvas


def _map_page(theme: Theme, title: str) -> Canvas:
    """A page for maps, with a legend."""
    canvas = _page(theme, title, "computed")
    canvas.text((340, 62), "queries down, keys across", LABEL, theme.faint, "ls")
    canvas.shares(np.linspace(0, 1, 256)[None], (718, 47, 804, 63))
    canvas.text((706, 62), "skipped", LABEL, theme.faint, "rs")
    return canvas


def _draw_maps(
    canvas: Canvas, names: Sequence[str], shares: Sequence[np.ndarray], room_for: int
) -> None:
    """Maps ``[Tq, Tk]`` 0..1 with their names, as large as if there were ``room_for`` of them."""
    columns, rows = _grid(room_for)
    height = (SIZE[1] - 108) / rows
    side = min((SIZE[0] - MARGIN) / columns - 20, height - 44)
    width = side + 44
    left = (SIZE[0] - columns * width + 44) / 2
    for i, (name, share) in enumerate(zip(names, shares, strict=True)):
        x = left + i % columns * width
        y = 96 + i // columns * height
        canvas.text((x, y + 28), name[-12:], LABEL, canvas.theme.ink, "ls")
        canvas.text((x + side, y + 28), f"{share.mean():.0%}", LABEL, canvas.theme.faint, "rs")
        canvas.shares(share, (x, y + 38, x + side, y + 38 + side))


def _bars(
    canvas: Canvas,
    box: Box,
    values: Sequence[float | None],
    colour: Colour,
    upper: float | None = None,
    beside: Sequence[float | None] = (),
) -> None:
    """A bar for every value, with a line at the height of the value in ``beside``; ``upper``: the
    top of the scale, if it is fixed."""
    top = _scale(canvas, box, upper or max(v for v in (*values, *beside) if v is not None))
    left, _, right, bottom = box
    width = (right - left) / len(values)
    gap = min(3.0, width / 5)
    for i, value in enumerate(values):
        if value is not None:
            x = left + i * width
            y = bottom - value / top * (bottom - box[1])
            canvas.box((x + gap, y, x + width - gap, bottom), colour)
    for i, value in enumerate(beside):
        if value is not None:
            x, y = left + i * width, bottom - value / top * (bottom - box[1])
            canvas.box((x, y - 1.5, x + width, y + 1.5), canvas.theme.second)


def _curves(
    canvas: Canvas,
    box: Box,
    mean: Sequence[float | None],
    worst: Sequence[float | None],
    allowed: Sequence[float],
    doubt: Sequence[Interval | None],
    colour: Colour,
) -> None:
    """Curves of the mean, worst and allowed lost mass in percent, with the intervals ``doubt`` of
    the mean; steps without a measurement are left out."""
    upper = [100 * interval.high for interval in doubt if interval is not None]
    known = [value for value in (*worst, *allowed, *upper) if value is not None]
    top = _scale(canvas, box, max(known, default=0.0) or 1.0)
    left, ceiling, right, bottom = box
    width = (right - left) / len(mean)

    def height(percent: float) -> float:
        return bottom - percent / top * (bottom - ceiling)

    def points(values: Sequence[float | None]) -> list[tuple[float, float]]:
        return [
            (left + (i + 0.5) * width, height(value))
            for i, value in enumerate(values)
            if value is not None
        ]

    for i, interval in enumerate(doubt):
        if interval is not None:
            x = left + (i + 0.5) * width
            canvas.line([(x, height(100 * interval.low)), (x, height(100 * interval.high))], colour)
    canvas.line(points(allowed), canvas.theme.faint, 2)
    canvas.line(points(worst), colour, 1)
    canvas.line(points(mean), colour, 3)
    for point in points(mean):
        canvas.dot(point, colour, min(4.5, width / 3))


def _scale(canvas: Canvas, box: Box, upper: float) -> float:
    """A panel with labelled lines; returns the value at its top."""
    left, top, right, bottom = box
    canvas.box(box, canvas.theme.panel)
    marks = ticks(max(upper, 1e-6), 4)
    for mark in marks:
        y = bottom - mark / marks[-1] * (bottom - top)
        canvas.box((left, y - 0.5, right, y + 0.5), canvas.theme.background)
        canvas.text((left - 12, y), f"{mark:g}", LABEL - 2, canvas.theme.faint, "rm")
    return marks[-1]


def _step_labels(
    canvas: Canvas, steps: Sequence[int], left: float, right: float, bottom: float
) -> None:
    width = (right - left) / len(steps)
    for i in labelled(len(steps), 14):
        x = left + (i + 0.5) * width
        canvas.text((x, bottom + 12), str(steps[i] + 1), LABEL, canvas.theme.faint, "ma")
    canvas.text(((left + right) / 2, bottom + 40), "step", LABEL, canvas.theme.ink, "ma")


def _legend(canvas: Canvas, box: Box) -> None:
    """The colour ramp, its upper end labelled computed and its lower end skipped."""
    _, top, right, bottom = box
    canvas.shares(np.linspace(1, 0, 256)[:, None], box)
    for share in (0, 0.5, 1):
        y = bottom - share * (bottom - top)
        anchor = {0: "ls", 0.5: "lm", 1: "la"}[share]
        canvas.text((right + 8, y), f"{share:.0%}", LABEL - 2, canvas.theme.faint, anchor)


def _grid(count: int) -> tuple[int, int]:
    """Columns and rows for ``count`` squares, as large as the page allows."""
    options = [(columns, -(-count // columns)) for columns in range(1, count + 1)]
    return max(options, key=lambda o: min(SIZE[0] / o[0], (SIZE[1] - 108) / o[1] - 24))


def _worst_layer(calls: Sequence[CallStats]) -> float | None:
    lost = [mean_lost(some) for some in by(calls, "layer").values()]
    return max((value for value in lost if value is not None), default=None)


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share
