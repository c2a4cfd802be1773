"""The error budget: choosing thresholds from what is allowed, and holding the measured loss."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from comfyui_liteattention import policy
from comfyui_liteattention.attention import LayerState, attend
from comfyui_liteattention.backends.base import Inputs
from comfyui_liteattention.backends.reference import ReferenceBackend
from comfyui_liteattention.backends.tile_map import mark
from comfyui_liteattention.budget import allocation
from comfyui_liteattention.budget.allocation import BINS, PER_LOG2
from comfyui_liteattention.budget.ledger import (
    MARGIN,
    PRIOR,
    enter_audit,
    lost_per_bound,
    open_ledger,
)
from comfyui_liteattention.plan import Plan
from comfyui_liteattention.run import Run
from comfyui_liteattention.schedule import Progress
from comfyui_liteattention.settings import Settings
from comfyui_liteattention.tiles import TileShape

CPU = torch.device("cpu")


#: A tile counts with the mean mass of its bin, so it may be off by this factor.
WITHIN_A_BIN = 2 ** (1 / PER_LOG2)
NO_OTHERS = torch.empty(0, 1 + BINS, dtype=torch.float64)


def remaining(score, droppable, ratio=1.0, spent=0.0):
    counts = allocation.histogram(score, droppable)
    held = counts * allocation.mass_of_bins(CPU) / score[..., 0].numel()
    return torch.cat([torch.tensor([spent], dtype=torch.float64), ratio * held])


def having_lost(*spent):
    """Rows ``[N, 1 + BINS]`` for layers that have nothing left to skip."""
    lost = torch.tensor(spent, dtype=torch.float64).unsqueeze(1)
    return torch.cat([lost, torch.zeros(len(spent), BINS)], 1)


def some_scores(seed):
    generator = torch.Generator().manual_seed(seed)
    score = -20 * torch.rand(2, 3, 6, 40, generator=generator)
    return score, torch.rand(score.shape, generator=generator) < 0.7


@given(seed=st.integers(0, 10**6), allowed=st.floats(0, 2))
def test_the_threshold_spends_what_is_allowed_and_no_more(seed, allowed):
    score, droppable = some_scores(seed)
    limit = allocation.score_limit(remaining(score, droppable), NO_OTHERS, allowed)
    spent = torch.where(droppable & (score <= limit), score.exp2(), 0).sum().double() / 36
    assert spent <= allowed * WITHIN_A_BIN + 1e-6
    # One more bin would exceed the budget, unless everything has been skipped already.
    next_bin = droppable & (score <= limit + 1 / PER_LOG2)
    if (droppable & ~next_bin).any():
        more = torch.where(next_bin, score.exp2(), 0).sum().double() / 36
        assert more * WITHIN_A_BIN > allowed - 1e-6


def test_scores_of_tiles_that_were_not_visited_cost_nothing():
    score = torch.linspace(-12, -0.1, 24).view(1, 1, 3, 8)
    everywhere = torch.ones_like(score, dtype=torch.bool)
    limit = allocation.score_limit(remaining(score, everywhere), NO_OTHERS, 0.02)
    assert -12 < limit < -0.1
    unvisited = torch.full((1, 1, 3, 5), -math.inf)
    wider = torch.cat([score, unvisited], -1)
    visited = torch.cat([everywhere, torch.zeros_like(unvisited, dtype=torch.bool)], -1)
    assert allocation.score_limit(remaining(wider, visited), NO_OTHERS, 0.02) == limit


@given(seed=st.integers(0, 10**6), aim=st.floats(1e-4, 0.5))
def test_layers_share_one_threshold_up_to_the_largest_share(seed, aim):
    (score, droppable), ratios = some_scores(seed), (1.0, 0.3, 0.05)
    layers = [
        remaining(score - 3 * i, droppable, ratio, spent=0.1 * i * aim)
        for i, ratio in enumerate(ratios)
    ]
    lost = []
    for i, own in enumerate(layers):
        limit = allocation.score_limit(own, torch.stack(layers[:i] + layers[i + 1 :]), aim)
        gone = (torch.arange(-BINS, 0) / PER_LOG2) <= limit
        lost.append(own[0] + own[1:][gone].sum())
        assert lost[-1] <= allocation.LARGEST_SHARE * aim + 1e-9
    assert sum(lost) <= 3 * aim + 1e-9


def test_a_layer_that_loses_little_leaves_its_share_to_the_others():
    score, droppable = some_scores(3)
    own, idle = remaining(score, droppable), remaining(score, torch.zeros_like(droppable))
    alone = allocation.score_limit(own, NO_OTHERS, 0.01)
    assert allocation.score_limit(own, own[None], 0.01) == alone  # twins share evenly
    assert allocation.score_limit(own, idle[None], 0.01) > alone
    idle[0] = 0.015
    assert allocation.score_limit(own, idle[None], 0.01) < alone


def test_the_mean_of_the_aim_over_a_run_is_the_budget_with_its_margin():
    for ramp in (0.0, 1.0, 2.0):
        plan = Plan(Settings(budget=0.01, ramp=ramp), (), known=False)
        aims = [plan.aim(Progress(t, (t + 0.5) / 1000)) for t in range(1000)]
        assert sum(aims) / 1000 == pytest.approx(0.01 * MARGIN, rel=1e-3)
        assert aims == sorted(aims)


def test_the_ratio_of_loss_to_bound_is_learned():
    ledger = open_ledger(CPU)
    assert float(lost_per_bound(ledger)) == pytest.approx(PRIOR)
    ledger[0] = 0.1
    for _ in range(30):
        ledger = enter_audit(ledger, torch.tensor(0.02))
    assert float(lost_per_bound(ledger)) == pytest.approx(0.2, rel=0.15)


class Truth(ReferenceBackend):
    """Also measures what every call really loses, over all rows."""

    def __init__(self):
        super().__init__(TileShape(16, 16), torch.float32)
        self.lost = []

    def forward(self, call, lists=None, criterion=None):
        result = super().forward(call, lists, criterion)
        if lists is not None:
            full = super().forward(call)
            self.lost.append(float(policy.lost_mass(result.lse, full.lse).mean()))
        return result


def test_a_layer_that_lost_far_too_much_starts_over():
    most = allocation.TOO_MUCH * allocation.LARGEST_SHARE

    def overspent(own, others, aim):
        return bool(allocation.overspent(having_lost(own)[0], having_lost(*others), aim))

    assert overspent(0.011 * most, [], 0.01)
    assert overspent(0.011 * most, [0.0] * 9, 0.01)
    assert not overspent(0.012, [0.012] * 9, 0.01)
    # Where all lose too much, those above the mean start over.
    assert overspent(0.02, [0.016] * 9, 0.01)
    assert not overspent(0.016, [0.02] * 9, 0.01)
    assert not overspent(0.0, [], 1e-6)


def test_a_choice_spends_what_it_drops_and_starts_over_where_that_was_too_much():
    score, droppable = some_scores(4)
    counts, tiles = allocation.histogram(score, droppable), score[..., 0].numel()
    ledger = open_ledger(CPU)
    choice = allocation.choose(counts, tiles, ledger, None, 1.0, [], 0.05)
    dropped = torch.where(droppable & (score <= choice.limit.score), score.exp2(), 0).sum() / tiles
    assert float(choice.ledger[0]) == pytest.approx(float(dropped), rel=0.05) and dropped > 0.03
    assert float(choice.remaining.sum()) == pytest.approx(float(remaining(score, droppable).sum()))
    assert choice.limit.score.dtype == torch.float32 and not choice.limit.all_back

    # An audit then shows that ten times as much is lost as was estimated.
    again = allocation.choose(counts, tiles, choice.ledger, 10 * dropped, 1.0, [], 0.05)
    assert again.limit.all_back and again.ledger[0] == 0 and again.remaining[0] == 0
    live = mark(torch.zeros_like(droppable), score, again.limit, ~droppable[0, 0])
    assert live.all()


def test_every_audit_is_entered_once():
    """Audits of calls that mark tiles and of calls that don't."""
    state, settings = LayerState(name="0"), Settings(budget=0.05, audit=1, warmup=0.4)
    q, k, v = torch.randn(3, 1, 1, 64, 32, generator=torch.Generator().manual_seed(0))
    backend = ReferenceBackend(TileShape(16, 16), torch.float32)
    audits = []
    for position in (0.5, 0.6, 0.3, 0.7):
        attend(state, backend, Inputs(q, k, v, 0.2), settings, position, aim=0.05 * position)
        audits.append(float(state.ledger[3]))
    assert audits == pytest.approx([0, 1, 1.8, 2.44])


def drifting(steps, tokens=512, sharpness=4.0):
    """``q, k, v [1, 2, tokens, 32]`` of every step: broad and local heads mixed."""
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
        yield heads * place + q_t, heads * place + k_t, v


@pytest.mark.parametrize("allowed", [0.002, 0.01, 0.03])
@pytest.mark.parametrize("sharpness", [2.0, 4.0])
def test_the_true_loss_stays_within_the_budget(allowed, sharpness):
    steps, tokens = 20, 512
    backend = Truth()
    sigmas = [1 - t / steps for t in range(steps + 1)]
    # The tail would cost 1 in 16 at tiles as small as these.
    settings = Settings(budget=allowed, audit=16, min_tokens=0, tail=False)
    run = Run(settings, backend, sigmas)
    for t, (q, k, v) in enumerate(drifting(steps, tokens, sharpness)):
        run.attend("0", ["x"], run.locate(sigmas[t]), Inputs(q, k, v, 32**-0.5))
    report = run.finish()
    truth = sum(backend.lost) / steps
    assert 0.3 * allowed < truth <= allowed
    assert report.computed_fraction < 0.75


def test_the_loss_goes_where_it_saves_most_and_is_held():
    """A layer with sharp attention and one with broad attention, two streams."""
    steps, allowed = 20, 0.02
    backend = Truth()
    sigmas = [1 - t / steps for t in range(steps + 1)]
    settings = Settings(budget=allowed, audit=16, min_tokens=0, tail=False)
    run = Run(settings, backend, sigmas)
    layers = {"sharp": drifting(steps, sharpness=5.0), "broad": drifting(steps, sharpness=2.0)}
    for t, inputs in enumerate(zip(*layers.values(), strict=True)):
        for layer, qkv in zip(layers, inputs, strict=True):
            for stream in ("cond", "uncond"):
                run.attend(layer, [stream], run.locate(sigmas[t]), Inputs(*qkv, 32**-0.5))
    shared = {id(one.state.remaining): set(one.state.remaining) for one in run._states.named()}
    assert list(shared.values()) == [set(layers)] * 2
    report = run.finish()
    assert not run._states.named()
    computed, lost = [], []
    for i, layer in enumerate(layers):
        calls = [call for call in report.calls if call.layer == layer]
        computed.append(sum(call.computed for call in calls) / sum(call.total for call in calls))
        per_step = zip(backend.lost[2 * i :: 4], backend.lost[2 * i + 1 :: 4], strict=True)
        lost.append(sum(a + b for a, b in per_step) / (2 * steps))
    assert computed[0] < computed[1] - 0.1
    assert 0.3 * allowed < sum(lost) / 2 <= allowed
    assert max(lost) <= 2 * allowed
