"""The report of a run as numbers, text and pictures, from made-up statistics."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from comfyui_liteattention.eligibility import CROSS_ATTENTION
from comfyui_liteattention.report.canvas import SHARP, THEMES, Canvas, labelled, ramp_colours, ticks
from comfyui_liteattention.report.pictures import (
    LEFT,
    PAGE,
    RIGHT,
    SIZE,
    by_layer,
    heat_map,
    pictures,
    short_names,
    step_chart,
)
from comfyui_liteattention.report.statistics import (
    CallStats,
    MapStats,
    RunReport,
    figures,
    fraction,
    mean_lost,
    node_line,
    percent,
    saving,
    status_line,
)
from comfyui_liteattention.report.table import text_table

WIDTH, HEIGHT = SIZE
STREAMS = ("positive", "negative")


def computed(step, layer):
    return 100 if step == 0 else 100 - 10 * layer


def report(layers=4, steps=6, tiles=8, name="{}"):
    """Layer ``i`` computes ``100 - 10 i`` percent from step 1 on, and loses 0.1 percent ``i``."""
    sites = [(s, i, t) for s in range(steps) for i in range(layers) for t in STREAMS]
    return RunReport(
        settings="threshold=-0.3",
        backend="cpu",
        steps=steps,
        seconds=12.0,
        step_seconds=dict.fromkeys(range(steps), 2.0),
        calls=tuple(
            CallStats(s, name.format(i), t, 4096, computed(s, i), 100, i / 1000 if s else None)
            for s, i, t in sites
        ),
        reasons={CROSS_ATTENTION: 48},
        maps=tuple(
            MapStats(name.format(i), t, 4096, torch.full((tiles, tiles), float(t == "positive")))
            for i in range(layers)
            for t in STREAMS
        ),
    )


def pixel(picture, x, y):
    return (picture[round(y), round(x)] * 255).round().int().tolist()


def test_means():
    calls = report().calls
    assert fraction(calls) == pytest.approx((1 + 5 * 0.85) / 6)
    assert fraction(()) == 1
    # The first step is dense and loses nothing; calls without an audit count like audited ones.
    assert mean_lost(calls) == pytest.approx(5 * 0.0015 / 6)
    assert mean_lost([CallStats(1, "0", "positive", 64, 50, 100, None)]) is None


def test_status_says_active_or_why_not():
    assert "LiteAttention active: 12% of the tiles skipped" in status_line(report())
    idle = replace(report(layers=1), reasons={CROSS_ATTENTION: 3, "short sequence": 2})
    assert status_line(idle) == "LiteAttention inactive: short sequence"


def test_text_has_a_line_per_layer_step_and_reason():
    lines = text_table(report()).splitlines()
    assert "layer 3          75.0%     0.250%" in lines
    assert any(line.startswith("6 ") and line.endswith("2.00") for line in lines)
    assert not any(line.startswith("0 ") for line in lines)  # steps are counted from 1 everywhere
    assert f"      48 x {CROSS_ATTENTION}" in lines


def timed(**changes):
    """A dense tile takes 1 ms, a call of ours 0.09 s; one layer waits in the first step."""
    plain = report()
    calls = tuple(call._replace(seconds=0.09) for call in plain.calls)
    waiting = (calls[0]._replace(seconds=5.0, waits=True), *calls[1:])
    return replace(plain, calls=waiting, dense_rate=0.001, **changes)


def test_seconds_saved_are_told_everywhere():
    saved = (6 * 8 - 1) * (0.1 - 0.09)
    assert timed().saved_seconds == pytest.approx(saved)
    assert timed().attention_speedup == pytest.approx(0.1 / 0.09)
    assert timed().dense_seconds == pytest.approx({0: 2.07} | dict.fromkeys(range(1, 6), 2.08))
    assert "1.11x as fast, saved about 0.5 s (estimated)" in status_line(timed())
    assert node_line(timed()).endswith("saved about 0.5 s")
    assert any(line.endswith("2.00         2.08") for line in text_table(timed()).splitlines())
    plain = figures(timed())
    assert plain["saved_seconds"] == pytest.approx(saved)
    assert plain["per_step"][0]["dense_seconds"] == pytest.approx(2.07)
    for line in (status_line(report()), node_line(report()), text_table(report())):
        assert "saved" not in line
        assert "est." not in line


def test_a_node_says_why_a_run_was_stopped_in_few_words():
    stopped = "your own attention is faster here: LiteAttention took 1.52 times as long"
    some = replace(report(), stopped=stopped)
    assert node_line(some).startswith("switched off: your own attention is faster here; until then")
    none = replace(report(layers=1), stopped=stopped, reasons={stopped: 3})
    assert node_line(none) == "switched off: your own attention is faster here"
    assert stopped in status_line(some)
    assert stopped in status_line(none)


def test_a_node_says_what_was_lost_in_few_digits():
    known = replace(report(), allowed=(0.0298,) * 6)
    assert node_line(known).startswith("12% skipped, lost 0.13 of 3 %")


@pytest.mark.parametrize(
    ("share", "text"),
    [(0, "0"), (0.0063, "0.63"), (0.0211, "2.1"), (0.0298, "3"), (0.36, "36"), (0.999, "100")],
)
def test_percent_in_two_digits(share, text):
    assert percent(share) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (3.14, "saved about 3.1 s"),
        (123.4, "saved about 123 s"),
        (0.01, "nothing saved"),
        (-0.01, "nothing saved"),
        (-2.0, "cost about 2.0 s"),
    ],
)
def test_a_saving_in_words(seconds, text):
    assert saving(seconds) == text


def test_the_chart_marks_what_each_step_would_have_taken():
    line = torch.tensor(THEMES["dark"].second) / 255
    marked = (step_chart(timed(), THEMES["dark"]) - line).abs().sum(-1) < 0.05
    plain = (step_chart(report(), THEMES["dark"]) - line).abs().sum(-1) < 0.05
    third = slice(SIZE[1] * 2 // 3, None)
    assert marked[third].sum() > RIGHT - LEFT > plain[third].sum()


def test_figures_are_plain_json():
    plain = json.loads(json.dumps(figures(report()), allow_nan=False))
    assert plain["computed_fraction"] == pytest.approx(report().computed_fraction)
    assert [row["step"] for row in plain["per_step"]] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize(("layers", "pages"), [(1, 1), (4, 1), (PAGE, 1), (PAGE + 1, 2), (40, 4)])
def test_pictures_have_one_size(theme, layers, pages):
    maps, charts = pictures(report(layers), theme)
    assert maps.shape == (pages, HEIGHT, WIDTH, 3)
    assert charts.shape == (2, HEIGHT, WIDTH, 3)
    background = torch.tensor(THEMES[theme].background) / 255
    for picture in (*maps, *charts):
        assert picture.dtype == torch.float32
        assert 0 <= picture.min() < picture.max() <= 1
        assert torch.allclose(picture[0, 0], background)


@pytest.mark.parametrize("theme", THEMES)
def test_the_heat_map_shows_each_cell_in_its_colour(theme):
    picture = heat_map(report(), THEMES[theme])
    left, top, right, bottom = LEFT, 116, RIGHT - 104, HEIGHT - 76
    for step in range(6):
        for layer in range(4):
            x = left + (step + 0.5) * (right - left) / 6
            y = top + (layer + 0.5) * (bottom - top) / 4
            share = np.array(computed(step, layer) / 100)
            assert pixel(picture, x, y) == ramp_colours(THEMES[theme], share).tolist()


@pytest.mark.parametrize("theme", THEMES)
def test_more_computed_is_further_from_the_background(theme):
    """The ramp's lightness goes one way: it can be read without its colours."""
    colours = THEMES[theme]
    levels = ramp_colours(colours, np.linspace(0, 1, 11)) @ np.array([0.2126, 0.7152, 0.0722])
    away = np.diff(levels) * (1 if sum(colours.background) < 384 else -1)
    assert (away > 0).all()


def test_a_map_is_the_mean_of_its_streams():
    (streams,) = by_layer(report(layers=1).maps).values()
    assert np.mean([live.numpy() for live in streams]) == 0.5
    two_sizes = (*report(layers=1).maps, MapStats("0", "positive", 64, torch.ones(2, 2)))
    assert len(by_layer(two_sizes)) == 2


def test_large_maps_are_averaged_before_they_are_coloured():
    cells = np.indices((200 * SHARP, 200 * SHARP)).sum(0) % 2
    canvas = Canvas(THEMES["dark"], (100, 100))
    canvas.shares(cells, (0, 0, 100, 100))
    half = ramp_colours(THEMES["dark"], np.array(0.5)).tolist()
    assert (canvas.tensor() * 255).round().unique(dim=1).squeeze().tolist() == [half] * 100


def test_a_copy_of_a_canvas_has_what_is_drawn_and_more_without_changing_it():
    theme = THEMES["dark"]
    canvas = Canvas(theme, (4, 4))
    canvas.box((0, 0, 2, 4), theme.accent)
    again = canvas.copy()
    again.box((2, 0, 4, 4), theme.ink)
    colours = [[c.image().getpixel((x, 0)) for x in (0, 3)] for c in (canvas, again)]
    assert colours == [[theme.accent, theme.background], [theme.accent, theme.ink]]


@pytest.mark.parametrize(
    "poor",
    [
        replace(report(), step_seconds={}),
        replace(report(), step_seconds={3: 0.0}),
        timed(step_seconds={3: 0.0}),
        timed(step_seconds={}),
        replace(report(), calls=tuple(c._replace(lost=None) for c in report().calls)),
        replace(report(), calls=tuple(c._replace(lost=0.0) for c in report().calls)),
        replace(report(), calls=report().calls[:1]),
        replace(report(), calls=report().calls[:11]),
        replace(report(), maps=()),
        report(name="a_very_long_name_of_a_layer_{}_and_more"),
        report(layers=90, steps=150),
    ],
)
def test_whatever_is_missing_the_rest_is_drawn(poor):
    maps, charts = pictures(poor, note="No map.")
    assert maps.shape[1:] == charts.shape[1:] == (HEIGHT, WIDTH, 3)
    assert len(charts) == 2


def test_without_calls_the_note_is_all_there_is():
    empty = pictures(None, note="LiteAttention: no run yet.")
    assert len(empty.maps) == len(empty.charts) == 1
    assert empty.maps.max() > 0.5  # letters
    nothing = replace(report(), calls=())
    assert torch.equal(pictures(nothing, note="x").maps, pictures(None, note="x").maps)


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["0", "1", "10"], ["0", "1", "10"]),
        (["blocks.9", "blocks.10"], ["9", "10"]),
        (["double-0.0", "double-1.0"], ["0", "1"]),
        (["attn1.3.x", "attn1.4.x"], ["3", "4"]),
        (["first", "second"], ["first", "second"]),
        (["double-0.0", "single-0.0"], ["double 0", "single 0"]),
        (["blocks.3"], ["3"]),
        (["3", "3"], ["3", "3"]),
    ],
)
def test_layers_are_called_by_the_number_that_tells_them_apart(names, short):
    assert short_names(names) == short


@pytest.mark.parametrize(
    ("upper", "marks"),
    [
        (100, [0, 50, 100]),
        (1, [0, 0.5, 1]),
        (0.037, [0, 0.01, 0.02, 0.03, 0.04]),
        (3, [0, 1, 2, 3]),
    ],
)
def test_ticks_are_round(upper, marks):
    assert ticks(upper) == pytest.approx(marks)


def test_labels_are_evenly_spaced_and_not_too_many():
    assert list(labelled(4, 14)) == [0, 1, 2, 3]
    assert list(labelled(50, 14)) == list(range(0, 50, 5))
    assert len(labelled(1000, 14)) <= 14


def with_bounds(made):
    """The same with bounds, as a budget gives them: every layer loses 0.2 to 0.3 of its own."""
    calls = (
        c if c.lost is None else c._replace(bound=c.lost / (0.2 if c.step % 2 else 0.3))
        for c in made.calls
    )
    return replace(made, calls=tuple(calls))


def test_with_a_budget_losses_have_intervals():
    known = with_bounds(report())
    for made, there in ((report(), False), (known, True)):
        assert ("95 %" in text_table(made)) is there
    layer = figures(known)["per_layer"]["2"]
    low, high = layer["lost_mass_95"]
    assert 0 < low < layer["lost_mass"] < high
    assert figures(known)["per_step"][0]["lost_mass_95"] is None  # a dense step loses nothing
    assert figures(report())["per_layer"]["2"]["lost_mass_95"] is None
    row = next(line for line in text_table(known).splitlines() if line.startswith("layer 2 "))
    assert f"{low:.2%} - {high:.2%}" in row
    assert not torch.equal(step_chart(known, THEMES["dark"]), step_chart(report(), THEMES["dark"]))
