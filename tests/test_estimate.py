"""Intervals of what layers lose: how often the truth lies within, and odd inputs."""

import random

import pytest

from comfyui_liteattention.report.confidence import Interval, Sample, intervals, mean


def runs(seed, steps=20, spread=0.4):
    """Audits of one layer whose ratio drifts from 0.3 to 0.2, and its true losses."""
    rng = random.Random(seed)
    samples, truth = [], {}
    for step in range(steps):
        bound, ratio = 0.001 * (step + 1) ** 2, 0.3 - 0.1 * step / steps
        truth[step] = ratio * bound
        noise = rng.lognormvariate(-(spread**2) / 2, spread)
        samples += [Sample("0", step, ratio * bound * noise, bound)] * 2  # both conditionings
    return samples, truth


def test_the_truth_lies_within_nearly_always():
    inside = total = 0
    for seed in range(200):
        samples, truth = runs(seed)
        found = intervals(samples)
        assert len(found) == 20
        for (_, step), interval in found.items():
            inside += interval.low <= truth[step] <= interval.high
            total += 1
    assert 0.9 < inside / total < 0.995


def test_more_scatter_makes_it_wider():
    def width(spread):
        found = intervals(runs(1, spread=spread)[0]).values()
        return sum((i.high - i.low) / i.lost for i in found)

    assert width(0.1) < 0.5 * width(0.4)


def test_equal_ratios_leave_no_doubt():
    found = intervals([Sample("a", step, 0.25 * (step + 1), step + 1.0) for step in range(4)])
    assert found["a", 2] == pytest.approx(Interval(0.75, 0.75, 0.75))


def test_layers_have_intervals_of_their_own():
    samples = [Sample(layer, s, r, 1.0) for layer, r in (("a", 0.1), ("b", 0.4)) for s in (0, 1)]
    assert intervals(samples)["a", 0].lost == pytest.approx(0.1)
    assert intervals(samples)["b", 1].lost == pytest.approx(0.4)


@pytest.mark.parametrize(
    "samples",
    [[], [Sample("a", 0, 0.1, 0.2)], [Sample("a", 0, 0.1, 0.2), Sample("a", 9, 0.1, 0.2)]],
)
def test_too_few_audits_tell_nothing(samples):
    assert intervals(samples) == {}


def test_no_loss_at_all():
    found = intervals([Sample("a", step, 0.0, 0.1) for step in range(3)])
    assert found["a", 1] == Interval(0, 0, 0)


def test_what_nothing_bounds_is_left_out():
    assert intervals([Sample("a", step, 0.0, 0.0) for step in range(3)]) == {}


def test_the_mean_of_several():
    assert mean([Interval(1, 0, 2), Interval(3, 2, 6)]) == Interval(2, 1, 4)
