"""The methods that we compare ourselves with do what their descriptions say."""

import math

import pytest
import torch

from benchmarks.quality import computed_at
from benchmarks.rivals import (
    TILE,
    Everything,
    SolAttention,
    UpstreamSemantics,
    Window,
    check_sol_attention,
    over_query_tiles,
    tile_scores,
)

SCALE = 64**-0.5


def qkv(seed=0, tokens=6 * TILE):
    q, k, v = torch.randn(3, 1, 2, tokens, 64, generator=torch.Generator().manual_seed(seed))
    return 3 * q, k, v


def exact(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=SCALE)


@pytest.mark.parametrize(
    "rival",
    [UpstreamSemantics(-math.inf), SolAttention(-1e9), Window(100), Everything(torch.float32)],
    ids=lambda r: str(r),
)
def test_with_every_tile_they_are_dense(rival):
    q, k, v = qkv()
    for _ in range(3):
        out, live = rival.attend("site", 0.5, q, k, v, SCALE)
        assert live.all()
        torch.testing.assert_close(out, exact(q, k, v), rtol=1e-4, atol=1e-4)


def test_tile_scores_are_the_largest_scores():
    q, k, _ = qkv(1)
    s = (q @ k.mT) * SCALE * math.log2(math.e)
    per_row = s.unflatten(-1, (-1, TILE)).amax(-1)
    torch.testing.assert_close(tile_scores(q, k, SCALE), per_row, rtol=1e-4, atol=1e-4)
    assert torch.equal(over_query_tiles(per_row), per_row.unflatten(2, (-1, TILE)).amax(3))


def test_upstream_marks_by_the_maximum_of_the_tiles_visited_before():
    """Written out row by row and tile by tile."""
    q, k, v = qkv(2)
    q[..., 0] = 8
    k[..., 2 * TILE : 3 * TILE, 0] += 6  # what matters, neither first nor last
    threshold, rival = -2.0, UpstreamSemantics(-2.0)
    best = tile_scores(q, k, SCALE)
    live = torch.ones(1, 2, 6, 6, dtype=torch.bool)
    for call in range(4):
        _, used = rival.attend("site", 0.5, q, k, v, SCALE)
        assert torch.equal(used, live)
        visits = range(6) if call % 2 == 0 else range(5, -1, -1)
        for h in range(2):
            for i in range(6):
                rows = best[0, h, i * TILE : (i + 1) * TILE]
                seen = torch.full((TILE,), -math.inf)
                for j in [j for j in visits if live[0, h, i, j]]:
                    live[0, h, i, j] = bool(((rows[:, j] - seen) > threshold).any())
                    seen = torch.maximum(seen, rows[:, j])
    assert not live.all()
    assert live.any(-1).all()


def test_a_window_is_a_band():
    q, k, v = qkv(3)
    _, live = Window(1).attend("site", 0.5, q, k, v, SCALE)
    assert live[0, 0].sum() == 16


def test_sol_attention_equals_the_reference_of_its_authors():
    message = check_sol_attention()
    if "not installed" in message:
        pytest.skip(message)
    assert "equals" in message


def test_where_a_curve_reaches_its_goal():
    assert computed_at([(0.4, 30.0), (0.6, 40.0)], 35.0) == pytest.approx(0.5)
    assert computed_at([(0.6, 40.0), (0.4, 30.0)], 29.0) is None
    assert computed_at([(0.4, 30.0)], 35.0) is None
