"""The maps of each step: kept small while a run goes on, and shown as an animation."""

import io
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import adaptive_avg_pool2d

from comfyui_liteattention.backends.base import Inputs
from comfyui_liteattention.backends.reference import ReferenceBackend
from comfyui_liteattention.report.animation import (
    FRAMES,
    GAP,
    MAP,
    SIZE,
    TOP,
    animation,
    shown_steps,
)
from comfyui_liteattention.report.canvas import THEMES, ramp_colours
from comfyui_liteattention.report.map_history import ALL, LAYERS, SIDE, StepMap, chosen, small_map
from comfyui_liteattention.report.statistics import RunReport
from comfyui_liteattention.run import Run
from comfyui_liteattention.settings import Settings
from comfyui_liteattention.tiles import TileShape, pack

BACKEND = ReferenceBackend(TileShape(16, 16))
SIGMAS = [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]


@pytest.mark.parametrize(("queries", "keys"), [(5, 7), (64, 64), (100, 65), (130, 300)])
def test_a_small_map_is_the_mean_of_heads_and_tiles(queries, keys):
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(3, queries, keys, generator=generator) < 0.4
    size = min(queries, SIDE), min(keys, SIDE)
    wanted = adaptive_avg_pool2d(mask.double().mean(0)[None], size)[0]
    got = small_map(pack(mask), keys)
    assert got.dtype == torch.uint8
    assert got.shape == size
    assert (got / ALL - wanted).abs().max() <= 0.51 / ALL


def test_all_and_nothing_are_exact():
    for value in (0, 1):
        mask = torch.full((40, 130, 150), value, dtype=torch.bool)
        assert small_map(pack(mask), 150).unique().tolist() == [value * ALL]


@pytest.mark.parametrize(
    ("count", "which"),
    [(0, []), (1, [0]), (3, [0, 1, 2]), (4, [0, 1, 2, 3]), (40, [0, 13, 26, 39])],
)
def test_a_few_layers_are_chosen_evenly(count, which):
    assert list(chosen(range(count))) == which


def sampled(layers=6, streams=("uncond", "cond"), **settings) -> RunReport:
    run = Run(Settings(min_tokens=0, **{"threshold": -3.0} | settings), BACKEND, SIGMAS)
    generator = torch.Generator().manual_seed(0)
    angle = torch.linspace(0, math.pi, 250).unsqueeze(-1) * torch.arange(1, 17)
    place = torch.cat([angle.cos(), angle.sin()], -1)
    q, k, v = 4 * place + torch.randn(3, len(streams), 2, 250, 32, generator=generator)
    for step, sigma in enumerate(SIGMAS[:-1]):
        run.begin_call(step)
        for layer in range(layers):
            run.attend(f"block-{layer}.0", streams, run.locate(sigma), Inputs(q, k, v, 32**-0.5))
        run.end_call(step, 0.0)
    return run.finish()


def test_a_run_keeps_the_maps_that_each_step_computed():
    report = sampled(audit=0)
    layers = [f"block-{i}.0" for i in (0, 2, 3, 5)]
    assert [(one.step, one.layer) for one in report.history] == [
        (step, layer) for step in range(1, 5) for layer in layers
    ]
    for one in report.history:
        (call,) = (
            call
            for call in report.calls
            if (call.step, call.layer, call.stream) == (one.step, one.layer, "uncond")
        )
        share = one.live.double().mean() / ALL
        assert share == pytest.approx(call.computed / call.total, abs=1 / ALL)
    kept = sum(one.live.numel() for one in report.history)
    assert kept <= 4 * LAYERS * SIDE**2


def test_layers_that_never_skip_are_not_chosen():
    report = sampled(layers=3, dense_layers=(0,))
    assert {one.layer for one in report.history} == {"block-1.0", "block-2.0"}


def test_a_run_of_one_step_has_no_history():
    run = Run(Settings(min_tokens=0), BACKEND, [1.0, 0.0])
    q, k, v = torch.randn(3, 1, 1, 64, 32)
    run.attend("0", ["c"], run.locate(1.0), Inputs(q, k, v, 1.0))
    report = run.finish()
    assert report.history == ()
    assert animation(report) is None
    assert animation(None) is None


def made_up(steps=5, layers=2) -> RunReport:
    """Step ``s`` computes one ``s``-th."""
    history = tuple(
        StepMap(step, f"{layer}", torch.full((8, 8), ALL // step, dtype=torch.uint8))
        for step in range(1, steps)
        for layer in range(layers)
    )
    return replace(RunReport("", "cpu", steps, 1.0, {}, (), {}, ()), history=history)


def frames(data: bytes) -> list[np.ndarray]:
    """In the order of the steps: the last one comes first in the file."""
    image = Image.open(io.BytesIO(data))
    assert image.size == SIZE
    shown = []
    for i in range(image.n_frames):
        image.seek(i)
        shown.append(np.asarray(image.convert("RGB")))
    return [*shown[1:], shown[0]]


@pytest.mark.parametrize("theme", THEMES)
def test_every_step_is_a_frame_in_its_colours(theme):
    shown = frames(animation(made_up(), theme))
    assert len(shown) == 5
    x, y = (SIZE[0] - GAP - MAP) // 2, TOP + MAP // 2  # in the left one of two maps
    for step, frame in enumerate(shown):
        share = np.array(1.0 if step == 0 else ALL // step / ALL)
        assert frame[y, x].tolist() == ramp_colours(THEMES[theme], share).tolist()


def test_a_bar_says_how_far_the_run_is():
    accent = np.array(THEMES["dark"].accent)
    done = [(frame[-2] == accent).all(-1).mean() for frame in frames(animation(made_up()))]
    assert done == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_long_runs_leave_out_steps_but_neither_end():
    steps = shown_steps(made_up(100).history)
    assert (steps[0], steps[-1], len(steps)) == (0, 99, FRAMES)
    assert steps == sorted(set(steps))
    # A second expert begins in the middle of the schedule.
    second = [one._replace(step=one.step + 10) for one in made_up(5).history]
    assert shown_steps(second) == [10, 11, 12, 13, 14]


def test_a_layer_that_stops_early_is_shown_as_computed():
    report = made_up()
    report = replace(report, history=report.history[:-1])
    assert len(frames(animation(report))) == 5
