import pytest
import torch

from comfyui_liteattention.schedule import locate

SIGMAS = [1.0, 0.96, 0.889, 0.727, 0.0]


@pytest.mark.parametrize(
    ("sigma", "step", "position"), [(1, 0, 0.25), (0.96, 1, 0.5), (0.727, 3, 1)]
)
def test_listed_sigmas(sigma, step, position):
    assert locate(sigma, SIGMAS) == (step, pytest.approx(position))


def test_between_two_steps_and_beyond_the_ends():
    assert locate(0.98, SIGMAS) == (0, pytest.approx(0.375))
    assert locate(2.0, SIGMAS) == (0, 0.25)
    assert locate(0.0, SIGMAS) == (3, 1.0)
    assert locate(0.5, [0.5]) == (0, 1.0)


def test_float32_sigmas_are_found():
    sigmas = torch.linspace(1, 0, 31).tolist()
    for i, sigma in enumerate(torch.linspace(1, 0, 31).double().tolist()[:-1]):
        assert locate(sigma, sigmas).step == i


def test_positions_rise_with_falling_sigma():
    positions = [locate(s / 100, SIGMAS).position for s in range(100, -1, -1)]
    assert positions == sorted(positions)
    assert 0 < positions[0] <= positions[-1] <= 1


@pytest.mark.parametrize(
    ("sigma", "step", "position"), [(0, 0, 0.25), (0.727, 1, 0.5), (0.96, 3, 1), (0.9245, 2, 0.875)]
)
def test_rising_sigmas(sigma, step, position):
    """What FlipSigmas makes of a schedule."""
    assert locate(sigma, SIGMAS[::-1]) == (step, pytest.approx(position))
