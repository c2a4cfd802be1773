"""The error budget: choosing thresholds from what is allowed, and holding the measured loss."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from comfyui_liteattention import budget, policy
from comfyui_liteattention.backends.reference import ReferenceBackend
from comfyui_liteattention.run import Run
from comfyui_liteattention.settings import Settings
from comfyui_liteattention.tiles import TileShape

CPU = torch.device("cpu")


@given(seed=st.integers(0, 10**6), allowed=st.floats(0, 2))
def test_the_threshold_spends_what_is_allowed_and_no_more(seed, allowed):
    score = -20 * torch.rand(2, 3, 6, 40, generator=torch.Generator().manual_seed(seed))
    droppable = torch.rand(score.shape, generator=torch.Generator().manual_seed(seed + 1)) < 0.7
    limit = budget.threshold_for(score, droppable, torch.tensor(allowed))
    spent = torch.where(droppable & (score <= limit), score.exp2(), 0).sum().double() / 36
    assert spent <= allowed + 1e-6
    # One bin more would be too much, unless everything went already.
    next_bin = droppable & (score <= limit + budget.BIN)
    if (droppable & ~next_bin).any():
        more = torch.where(next_bin, score.exp2(), 0).sum().double() / 36
        assert more > allowed - 1e-6


def test_scores_of_tiles_that_were_not_visited_cost_nothing():
    score = torch.linspace(-12, -0.1, 24).view(1, 1, 3, 8)
    everywhere = torch.ones_like(score, dtype=torch.bool)
    allowed = torch.tensor(0.02)
    limit = budget.threshold_for(score, everywhere, allowed)
    assert -12 < limit < -0.1
    unvisited = torch.full((1, 1, 3, 5), -math.inf)
    wider = torch.cat([score, unvisited], -1)
    visited = torch.cat([everywhere, torch.zeros_like(unvisited, dtype=torch.bool)], -1)
    assert budget.threshold_for(wider, visited, allowed) == limit


def test_the_mean_of_the_target_over_a_run_is_the_budget_with_its_margin():
    for ramp in (0.0, 1.0, 2.0):
        targets = [budget.target(0.01, ramp, (t + 0.5) / 1000) for t in range(1000)]
        assert sum(targets) / 1000 == pytest.approx(0.01 * budget.MARGIN, rel=1e-3)
        assert targets == sorted(targets)


def test_the_ratio_of_loss_to_bound_is_learned():
    ledger = budget.open_ledger(CPU)
    assert float(budget.lost_per_bound(ledger)) == pytest.approx(budget.PRIOR)
    ledger = ledger._replace(bound=torch.tensor(0.1))
    for _ in range(30):
        ledger = budget.enter_audit(ledger, torch.tensor(0.02))
    assert float(budget.lost_per_bound(ledger)) == pytest.approx(0.2, rel=0.15)
    assert float(budget.room(ledger, 0.01)) == 0.0  # 0.02 is lost already
    assert float(budget.room(ledger, 0.03)) == pytest.approx(0.03 / 0.2 - 0.1, rel=0.3)


class Truth(ReferenceBackend):
    """Also measures what every call really loses, over all rows."""

    def __init__(self):
        super().__init__(TileShape(16, 16), torch.float32)
        self.lost = []

    def forward(self, q, k, v, scale, lists=None, criterion=None):
        result = super().forward(q, k, v, scale, lists, criterion)
        if lists is not None:
            full = super().forward(q, k, v, scale)
            self.lost.append(float(policy.lost_mass(result.lse, full.lse).mean()))
        return result


def test_a_layer_that_lost_far_too_much_starts_over():
    ledger = budget.open_ledger(CPU)._replace(bound=torch.tensor(0.1))
    for _ in range(5):
        ledger = budget.enter_audit(ledger, torch.tensor(0.05))
    assert budget.overspent(ledger, 0.01)
    assert not budget.overspent(ledger, 0.05)
    assert not budget.overspent(budget.open_ledger(CPU), 1e-6)


@pytest.mark.parametrize("allowed", [0.002, 0.01, 0.03])
@pytest.mark.parametrize("sharpness", [2.0, 4.0])
def test_the_true_loss_stays_within_the_budget(allowed, sharpness):
    """Attention that drifts over the steps, broad and local heads mixed."""
    steps, tokens = 20, 512
    backend = Truth()
    sigmas = [1 - t / steps for t in range(steps + 1)]
    # The tail would cost 1 in 16 at tiles as small as these.
    settings = Settings(budget=allowed, audit=16, min_tokens=0, tail=False)
    run = Run(settings, backend, sigmas)
    generator = torch.Generator().manual_seed(0)
    angle = torch.linspace(0, math.pi, tokens).unsqueeze(-1) * torch.arange(1, 17)
    place = torch.cat([angle.cos(), angle.sin()], -1)
    heads = sharpness * torch.tensor([1.0, 0.5]).view(1, 2, 1, 1)
    q, k, v = torch.randn(3, 1, 2, tokens, 32, generator=generator)
    drift = torch.randn(2, 1, 2, tokens, 32, generator=generator)
    for t in range(steps):
        turn = 0.1 * t
        q_t, k_t = (
            math.cos(turn) * x + math.sin(turn) * d for x, d in zip((q, k), drift, strict=True)
        )
        run.attend(
            "0", ["x"], run.locate(sigmas[t]), heads * place + q_t, heads * place + k_t, v, 32**-0.5
        )
    report = run.finish()
    truth = sum(backend.lost) / steps
    assert 0.3 * allowed < truth <= allowed
    assert report.computed_fraction < 0.75
