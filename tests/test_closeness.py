"""What each step may lose for a closeness, and what closeness to expect of what was lost."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from comfyui_liteattention.backends.base import Inputs
from comfyui_liteattention.backends.reference import ReferenceBackend
from comfyui_liteattention.budget.closeness import (
    ABOVE,
    GUIDANCE,
    MOST_LOST,
    POWER,
    allowed_losses,
    amplified,
    expected_closeness,
    strength_of,
    weights,
)
from comfyui_liteattention.plan import Plan
from comfyui_liteattention.presets import PRESETS
from comfyui_liteattention.report.statistics import figures, node_line
from comfyui_liteattention.report.table import text_table
from comfyui_liteattention.run import Run
from comfyui_liteattention.schedule import Progress, assumed_levels, noise_fractions
from comfyui_liteattention.settings import Settings
from comfyui_liteattention.tiles import TileShape

BACKEND = ReferenceBackend(TileShape(16, 16), torch.float32)


@given(st.integers(2, 60), st.floats(30, 60), st.floats(1, 12))
def test_what_is_allowed_comes_to_what_is_asked(steps, closeness, guidance):
    levels = assumed_levels(steps)
    losses = allowed_losses(closeness, levels, guidance)
    assert len(losses) == steps and losses[0] == 0
    assert all(0 < loss <= MOST_LOST for loss in losses[1:])
    expected = expected_closeness(losses, levels, guidance)
    assert expected.low < expected.db < expected.high
    # More than is asked only where no step can lose more.
    reached = pytest.approx(closeness + ABOVE)
    assert expected.db == reached or (expected.db > closeness and max(losses) == MOST_LOST)


def test_early_steps_lose_least_and_all_contribute_the_same():
    levels = assumed_levels(20)
    losses = allowed_losses(45, levels)[1:]
    assert all(a < b for a, b in pairwise(losses))
    shares = [
        weight * loss**POWER for loss, weight in zip(losses, weights(levels)[1:], strict=True)
    ]
    assert shares == pytest.approx([shares[0]] * len(shares))


def test_fewer_steps_may_lose_more():
    few, many = (sum(allowed_losses(42, assumed_levels(n))) / n for n in (4, 50))
    assert few > 1.5 * many


def test_a_second_run_that_begins_late_is_less_strict():
    whole = assumed_levels(8)
    first, second = allowed_losses(42, whole[:5]), allowed_losses(42, whole[4:])
    assert max(first) < min(second[1:])


def test_guidance_multiplies_errors():
    levels = assumed_levels(8)
    none, usual, strong = (allowed_losses(42, levels, guidance) for guidance in (1, GUIDANCE, 6))
    assert sum(none) > sum(usual) > sum(strong) and usual == allowed_losses(42, levels)
    assert amplified(1) < amplified(GUIDANCE) == 1 < amplified(6)


@pytest.mark.parametrize("told", [None, "6", [6.0, 3.0], torch.tensor([3.0, 6.0]), float("nan")])
def test_guidance_that_is_no_number_counts_as_calibrated(told):
    assert strength_of(told) == GUIDANCE


def test_weaker_guidance_than_none_counts_as_none():
    assert [strength_of(told) for told in (0, 0.5, 1, 6)] == [1, 1, 1, 6]


def test_nothing_lost_is_the_dense_video():
    assert expected_closeness([0.0, 0.0], (1.0, 0.5, 0.0)) is None


def test_noise_as_a_part_of_the_latent():
    assert noise_fractions([1.0, 0.5, 0.0], flow=True) == (1.0, 0.5, 0.0)
    assert noise_fractions([80.0, 1.0, 0.0], flow=False) == pytest.approx((80 / 81, 0.5, 0.0))


def test_where_the_schedule_is_unknown_the_noise_tells_where_a_call_is():
    plan = Plan(Settings(closeness=42), assumed_levels(0), known=False)
    aims = [plan.aim(Progress(99, position)) for position in (0.01, 0.3, 0.6, 1.0)]
    assert aims == sorted(aims) and aims[0] < aims[-1] / 10
    assert plan.aim(Progress(0, 1.0)) == plan.allowed[-1]


def test_a_run_holds_a_closeness_and_says_what_to_expect():
    steps = 6
    levels = assumed_levels(steps)
    settings = Settings(closeness=42, min_tokens=0, audit=4, never_slower=False)
    run = Run(settings, BACKEND, levels, levels=levels, guidance=5.0)
    random = torch.Generator().manual_seed(0)
    base = torch.randn(1, 2, 256, 32, generator=random)
    for step in range(steps):
        q = 3 * (base + 0.1 * torch.randn(base.shape, generator=random))
        run.attend("0", ["a"], run.locate(levels[step]), Inputs(q, q, q, 0.17))
    report = run.finish()
    assert report.active and report.allowed == allowed_losses(42, levels, 5.0)
    lost = {call.step: call.lost or 0.0 for call in report.calls}
    assert 0 < sum(lost.values()) < sum(report.allowed)
    losses = [lost[step] for step in range(steps)]
    assert report.expected == expected_closeness(losses, levels, 5.0)
    told = f"{report.expected.db:.0f} dB"
    assert told in text_table(report) and told in node_line(report)
    assert "Compare node" in text_table(report)
    assert figures(report)["predicted_db"] == report.expected.db


def test_presets_are_closenesses():
    assert [preset.closeness for preset in PRESETS.values()] == [50, 42, 35]
    with pytest.raises(ValueError, match="excludes a budget"):
        Settings(closeness=42, budget=0.1)
    with pytest.raises(ValueError, match="20 to 80"):
        Settings(closeness=3)
