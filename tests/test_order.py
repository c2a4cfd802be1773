"""Token orders: permutations whose tiles are compact, and attention that doesn't notice."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.orders import GRIDS, ORDERS, hilbert, radius
from comfyui_liteattention import policy
from comfyui_liteattention.attention import LayerState, attend
from comfyui_liteattention.backends.base import Inputs
from comfyui_liteattention.backends.reference import ReferenceBackend
from comfyui_liteattention.settings import Settings
from comfyui_liteattention.tiles import TileShape, unpack
from comfyui_liteattention.token_order import VideoTokens, arrange, compact_order, put, take

CPU = torch.device("cpu")
TILE = TileShape(16, 16)


def places(grid):
    return np.stack(np.unravel_index(np.arange(np.prod(grid)), grid), 1)


@given(st.tuples(*[st.integers(1, 9)] * 3), st.sampled_from([(64, 64), (128, 64), (16, 8)]))
def test_every_token_is_listed_once(grid, sizes):
    order = compact_order(places(grid), sizes)
    assert sorted(order) == list(range(np.prod(grid)))


def test_a_divisible_grid_is_cut_into_cubes():
    order = compact_order(places((8, 16, 16)), (128, 64))
    sides = np.ptp(places((8, 16, 16))[order].reshape(-1, 64, 3), axis=1) + 1
    assert (sides == 4).all()


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("grid", [(3, 5, 9), (8, 8, 8)])
def test_orders_to_compare_with_are_permutations(name, grid):
    assert sorted(ORDERS[name](grid)) == list(range(np.prod(grid)))


def test_a_hilbert_curve_goes_from_neighbour_to_neighbour():
    steps = np.diff(places((8, 8, 8))[hilbert((8, 8, 8))], axis=0)
    assert (np.abs(steps).sum(1) == 1).all()


@pytest.mark.parametrize("name", ["raster", "blocks 4 x 4 x 4", "blocks 1 x 8 x 8", "Hilbert"])
def test_no_other_order_has_clearly_more_compact_tiles(name):
    for grid in GRIDS.values():
        assert radius(ORDERS["compact"](grid), grid) < 1.05 * radius(ORDERS[name](grid), grid)


@pytest.mark.parametrize("grid", [(21, 45, 80), (21, 30, 52), (31, 22, 40)])
def test_the_tiles_of_real_grids_are_compact(grid):
    """Wan 720p and 480p at 81 frames, HunyuanVideo-like: no tile is a strip."""
    order = compact_order(places(grid), (128, 64))
    full = len(order) // 64 * 64
    sides = np.ptp(places(grid)[order][:full].reshape(-1, 64, 3), axis=1) + 1
    assert sides.max() <= 9
    assert sides.mean(0).max() < 6  # a cube of 64 has sides of 4


def test_tokens_beside_the_video_come_first_and_pieces_start_with_a_tile():
    video = VideoTokens((4, 8, 8), start=5)
    order = arrange(5 + 256 + 7, video, ((5, 9),), TILE, CPU)
    first = [*range(9), *range(261, 268)]
    assert order[:16].tolist() == first
    pieces = order[16 : 16 + 240].reshape(-1, 16).numpy() - 5
    sides = np.stack([np.ptp(axis, 1) for axis in np.unravel_index(pieces, video.grid)], 1) + 1
    assert sides.max() <= 4


@pytest.mark.parametrize("tokens_first", [False, True])
def test_what_was_taken_can_be_put_back(tokens_first):
    x = torch.randn(2, 20, 3, 4).transpose(1, 2)
    x = x if tokens_first else x.contiguous()
    order = torch.randperm(20)
    back = put(take(x, order), order)
    assert torch.equal(back, x) and back.transpose(1, 2).is_contiguous()


def qkv(tokens, seed=0):
    return torch.randn(3, 1, 2, tokens, 32, generator=torch.Generator().manual_seed(seed))


def test_the_order_changes_nothing_when_dense():
    backend = ReferenceBackend(TILE)
    video = VideoTokens((4, 6, 7), start=3)
    q, k, v = qkv(180)
    settings = Settings(min_tokens=0)
    out, _ = attend(LayerState(), backend, Inputs(q, k, v, 0.2), settings, 1.0, video)
    torch.testing.assert_close(out, backend.forward(Inputs(q, k, v, 0.2)).out, rtol=1e-6, atol=1e-6)


def test_tokens_beside_the_video_stay_dense_and_seen():
    """Rows of text are exact, and no tile with text keys is ever dropped."""
    backend = ReferenceBackend(TILE)
    video = VideoTokens((4, 8, 8), start=20)
    q, k, v = qkv(300, 1)
    q[..., 20:276, :] *= 6
    settings = Settings(threshold=-0.1, ramp=0.0, audit=0)
    state = LayerState()
    attend(state, backend, Inputs(q, k, v, 0.2), settings, 1.0, video)
    out, tally = attend(state, backend, Inputs(q, k, v, 0.2), settings, 1.0, video)
    assert int(tally.computed) < tally.total
    exact = backend.forward(Inputs(q, k, v, 0.2)).out
    text = policy.pinned_tokens((), video, 300)
    torch.testing.assert_close(out[:, :, text], exact[:, :, text], rtol=1e-6, atol=1e-6)
    live = unpack(state.live, 19)
    others = 3  # tiles that hold the 44 tokens beside the video, listed first
    assert live[..., :others].all() and live[..., :others, :].all()
    assert not live[..., others:, others:].all()
