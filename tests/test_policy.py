import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from comfyui_liteattention import policy
from comfyui_liteattention.backends.tile_map import mark
from comfyui_liteattention.settings import SAFEST, Settings, parse_layers
from comfyui_liteattention.tiles import TileShape
from comfyui_liteattention.token_order import VideoTokens

NOTHING_PINNED = torch.zeros(6, 40, dtype=torch.bool)


def random_scores(seed: int) -> torch.Tensor:
    return -20 * torch.rand(2, 3, 6, 40, generator=torch.Generator().manual_seed(seed))


@given(seed=st.integers(0, 10**6), low=st.floats(-20, 0), high=st.floats(-20, 0))
def test_a_safer_threshold_keeps_more(seed, low, high):
    low, high = sorted((low, high))
    score = random_scores(seed)
    safer = mark(None, score, low, NOTHING_PINNED)
    bolder = mark(None, score, high, NOTHING_PINNED)
    assert (safer >= bolder).all()


@given(seed=st.integers(0, 10**6))
def test_dead_tiles_stay_dead_and_every_row_keeps_its_best(seed):
    score = random_scores(seed)
    live = mark(None, score, -5.0, NOTHING_PINNED)
    again = mark(live, score.masked_fill(~live, -math.inf), -2.0, NOTHING_PINNED)
    assert (again <= live).all()
    nothing = mark(live, score.masked_fill(~live, -math.inf), 0.0, NOTHING_PINNED)
    assert (nothing.sum(-1) == 1).all()
    assert torch.equal(nothing.int().argmax(-1), score.argmax(-1))


def test_a_score_that_is_not_a_number_keeps_its_tile():
    score = torch.full((1, 1, 6, 40), math.nan)
    assert mark(None, score, -1.0, NOTHING_PINNED).all()


def test_pinned_rows_and_columns_stay():
    keys = policy.pinned_tokens(((0, 10),), None, 128)
    queries = policy.pinned_tokens(((100, 101),), None, 128)
    pinned = policy.pinned_tiles(queries, keys, TileShape(32, 32))
    assert pinned.int().tolist() == [[1, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
    kept = mark(None, torch.full((1, 1, 4, 4), -99.0), -1.0, pinned)
    assert (kept[0, 0] >= pinned).all()


def test_tokens_beside_the_video_are_pinned():
    video = VideoTokens((1, 2, 3), start=2)
    pinned = policy.pinned_tokens(((4, 5),), video, 10)
    assert pinned.int().tolist() == [1, 1, 0, 0, 1, 0, 0, 0, 1, 1]


def test_the_ramp_is_strict_first():
    settings = Settings(threshold=-3.0, ramp=2.0)
    at = [policy.threshold_at(settings, (t + 1) / 4, 1) for t in range(4)]
    assert at == pytest.approx([-3 + 2 * math.log2(u) for u in (0.25, 0.5, 0.75, 1)])
    assert policy.threshold_at(Settings(threshold=-3.0, ramp=0.0), 0.01, 1) == -3.0


def test_mass_is_shared_out_over_the_key_tiles_and_gap_is_not():
    assert policy.threshold_at(Settings(threshold=-3.0), 1.0, 64) == -9.0
    assert policy.threshold_at(Settings(threshold=-3.0, criterion="gap"), 1.0, 64) == -3.0


def test_warmup_and_the_safest_threshold_mark_nothing():
    warm = Settings(warmup=0.5)
    assert not policy.marks(warm, 0.5)
    assert policy.marks(warm, 0.55)
    assert not policy.marks(Settings(threshold=SAFEST), 1.0)
    assert policy.marks(Settings(threshold=SAFEST, budget=0.01), 1.0)


def test_the_audit_visits_every_tile_equally_often():
    visits = torch.zeros(24, dtype=torch.int32)
    for call in range(24 * 16):
        for i in policy.audited_tiles(call, 24, 16):
            visits[i] += 1
    assert visits.min() >= 20
    assert visits.max() <= 28
    assert not policy.audited_tiles(3, 24, 0)


def test_lost_mass_is_the_share_that_is_missing():
    kept, full = torch.tensor([0.0, -1.0]), torch.tensor([0.0, 0.0])
    assert policy.lost_mass(kept, full).tolist() == pytest.approx([0.0, 1 - math.exp(-1)])


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"threshold": 3.0}, "must be negative"),
        ({"threshold": math.nan}, "must be a number"),
        ({"criterion": "magic"}, "mass, gap"),
        ({"ramp": -1}, "between 0"),
        ({"warmup": 20}, "fraction"),
        ({"dense_layers": (-1,)}, "counted from 0"),
        ({"dense_keys": ((5, 5),)}, "start < end"),
        ({"audit": -1}, "0 .off."),
        ({"min_tokens": -1}, "must be 0 or more"),
    ],
)
def test_a_wrong_setting_says_what_to_do(wrong, says):
    with pytest.raises(ValueError, match=says):
        Settings(**wrong)


def test_layers_as_text():
    assert parse_layers("") == ()
    assert parse_layers(" 3, 0-1 ,38 - 39,") == (0, 1, 3, 38, 39)
    assert parse_layers("0\uff0c1\u30013\u20135") == (0, 1, 3, 4, 5)  # as Chinese keyboards write
    for wrong in ("a", "1-2-3", "-1", "1-", "99999999", "1;2"):
        with pytest.raises(ValueError, match="0, 1, 38-39"):
            parse_layers(wrong)
    with pytest.raises(ValueError, match="Write: 3-9"):
        parse_layers("1, 9-3")
