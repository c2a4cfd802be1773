"""Never slower: when a run begins to skip, and that it never loses more than a little time."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from comfyui_liteattention.attention import Tally
from comfyui_liteattention.backends.clock import stopwatch
from comfyui_liteattention.never_slower.account import ALLOWANCE, Account
from comfyui_liteattention.never_slower.costs import Costs, Rehearsal, first_step
from comfyui_liteattention.never_slower.pace import LOST, TIMED_CALLS, Pace, Timed
from comfyui_liteattention.never_slower.rehearsal import rehearse

TILES = 1000


def play(steps, layers, costs, fraction):
    """A run in which ``fraction(layer, step)`` of the tiles are computed. Returns its time relative
    to dense, and its pace."""
    pace, taken, begun = Pace(steps), 0.0, set()
    for step in range(steps):
        done = []
        for layer in range(layers):
            seconds = 1.0
            if pace.reason is None and pace.times:
                pace.timed.append(Timed(step, TILES, lambda: 1.0))
                if not pace.times:
                    pace.decide(costs)
            elif pace.reason is None and pace.takes_part(layer, step, TILES):
                computed = round(TILES * fraction(layer, step)) if layer in begun else TILES
                begun.add(layer)
                seconds = costs.of(computed / TILES)
                done.append((layer, computed))
            taken += seconds
        # The numbers of computed tiles are known only when the model has returned.
        for layer, computed in done:
            pace.settle(layer, TILES, computed)
    return taken / (steps * layers), pace


def falling(steps, slope, lowest):
    """Tiles that fall by ``slope`` per step to ``lowest``, with costs rehearsed for that."""

    def fraction(layer, step):
        return max(1 - slope * step, lowest)

    def costs(ratio, floor=0.0):
        return Costs(ratio, floor, fraction(0, steps / 2), fraction(0, steps))

    return fraction, costs


@given(
    steps=st.integers(2, 60),
    layers=st.integers(4, 60),
    costs=st.builds(
        lambda full, floor, half, final: Costs(full, floor * full, half, half * final),
        st.floats(0.5, 4.0),
        st.floats(0.0, 0.6),
        st.floats(0.1, 1.0),
        st.floats(0.1, 1.0),
    ),
    slopes=st.lists(st.floats(0.0, 0.5), min_size=1, max_size=60),
    lowest=st.floats(0.02, 1.0),
    good=st.floats(0.0, 1.0),
)
def test_however_the_tiles_fall_little_is_lost(steps, layers, costs, slopes, lowest, good):
    """Even if they fall less than expected: hardly, not at all, or only in the first layers."""

    def fraction(layer, step):
        slope = slopes[layer % len(slopes)] if layer < good * layers else 0.0
        return max(1 - slope * step, lowest)

    taken, _ = play(steps, layers, costs, fraction)
    assert taken <= 1 + ALLOWANCE + 1e-9


@pytest.mark.parametrize(
    ("ratio", "most"),
    [(0.9, 0.61), (1.0, 0.68), (1.05, 0.71), (1.15, 0.77), (1.3, 0.84), (1.4, 0.88), (1.6, 0.96)],
)
def test_what_pays_is_done(ratio, most):
    """Even if a full call is slower than dense. Tiles fall as in the small demo model."""
    fraction, costs = falling(20, 0.035, 0.4)
    taken, pace = play(20, 30, costs(ratio), fraction)
    assert taken < most
    assert pace.reason is None


@pytest.mark.parametrize(("ratio", "most"), [(1.4, 0.58), (2.1, 0.75), (2.5, 0.83), (3.2, 0.95)])
def test_beside_an_8_bit_attention_it_engages_late(ratio, most):
    """Where 80 % are skipped in the end, the late steps pay for what the layers' first calls cost.
    (Had all of them begun at the first step, 3.2 would have lost a third.)"""
    fraction, costs = falling(40, 0.035, 0.2)
    taken, pace = play(40, 30, costs(ratio), fraction)
    assert taken < most
    assert pace.reason is None


@pytest.mark.parametrize(("ratio", "steps"), [(1.8, 20), (3.0, 20), (1.6, 8), (1.4, 4), (4.0, 40)])
def test_what_cannot_win_never_begins(ratio, steps):
    fraction, costs = falling(steps, 0.7 / steps, 0.2 if steps == 40 else 0.4)
    taken, pace = play(steps, 30, costs(ratio), fraction)
    assert pace.reason is not None
    assert f"{ratio:.2f} times" in pace.reason
    assert taken == pytest.approx(1)


def test_a_run_that_skips_less_than_was_expected_is_given_up():
    taken, pace = play(20, 30, Costs(1.2, 0.0, 0.6, 0.4), lambda layer, step: 1.0)
    assert pace.reason == LOST
    assert 1 < taken <= 1 + ALLOWANCE


def test_the_first_step_is_the_one_that_takes_least():
    def total(costs, steps, start):
        late = sum(costs.at(step / steps) for step in range(start + 1, steps))
        return start + costs.full + late

    for costs in (Costs(1.5, 0.1, 0.5, 0.2), Costs(1.1, 0.0, 0.8, 0.7), Costs(0.9, 0.0, 1.0, 1.0)):
        totals = [total(costs, 12, start) for start in range(12)]
        found = first_step(costs, 12)
        assert found is not None
        assert totals[found] == pytest.approx(min(totals))
    assert first_step(Costs(1.1, 0.0, 0.8, 0.7), 12, first=7) in (None, 7)
    assert first_step(Costs(1.0, 0.0, 1.0, 1.0), 12) is None


def test_costs_follow_the_measured_points():
    costs = Rehearsal(full_seconds=2.0, final_seconds=0.8, half=0.6, final=0.2).costs(1.0)
    assert costs.of(1.0) == pytest.approx(2.0)
    assert costs.of(0.2) == pytest.approx(0.8)
    assert costs.at(0.0) == pytest.approx(2.0)
    assert costs.at(0.5) == pytest.approx(costs.of(0.6))
    assert costs.at(1.0) == pytest.approx(0.8)
    # Times that would give a negative floor are noise.
    assert Rehearsal(2.0, 0.1, 0.6, 0.2).costs(1.0).floor == 0.0
    assert Rehearsal(2.0, 2.1, 1.0, 0.99).costs(1.0).floor == 0.0
    assert Rehearsal(1.0, 3.0, 0.6, 0.2).costs(1.0).floor == 1.0


def test_an_account_puts_the_loss_of_the_next_call_aside():
    account = Account(Costs(1.5, 0.0, 0.5, 0.2), steps=100)
    account.see(0, TILES)
    assert account.left == pytest.approx(0.02 * 100 * TILES)
    assert account.covers("a", TILES)  # this call and the next may lose half a call each
    assert account.left == pytest.approx(TILES)
    account.settle("a", TILES, TILES)
    assert account.left == pytest.approx(TILES)
    account.settle("a", TILES, TILES // 5)  # it gained 0.7, and loses nothing next time
    assert account.left == pytest.approx(2 * TILES - 0.5 * TILES + 0.7 * TILES)


def test_a_rehearsal_goes_through_a_run_in_brief():
    asked = []

    def ask(state, position):
        asked.append((state, position))
        return Tally([100, 60, 20, 100][len(asked) - 1], 100, None)

    found = rehearse(ask, torch.device("cpu"))
    assert (found.half, found.final) == (0.6, 0.2)
    assert [position for _, position in asked] == [0.5, 1.0, 1.0, 1.0]
    assert asked[0][0] is asked[1][0] is asked[2][0] is not asked[3][0]


def test_a_stopwatch_counts_seconds():
    seconds = stopwatch(torch.device("cpu"))()
    assert 0 <= seconds() == seconds() < 5


def test_a_run_of_unknown_length_decides_too():
    pace = Pace(0)
    pace.timed += [Timed(0, TILES, lambda: 1.0)] * TIMED_CALLS
    pace.decide(Costs(1.01, 0.0, 0.6, 0.3))
    assert pace.takes_part("a", 0, TILES)
