import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from comfyui_liteattention import policy, tiles
from comfyui_liteattention.tiles import TileShape

sizes = st.integers(1, 5)


@given(b=sizes, h=sizes, tq=sizes, tk=st.integers(1, 100), seed=st.integers(0, 10**6))
def test_bits_hold_the_mask(b, h, tq, tk, seed):
    mask = torch.rand(b, h, tq, tk, generator=torch.Generator().manual_seed(seed)) < 0.5
    live = tiles.pack(mask)
    assert live.shape == (b, h, tq, -(-tk // 32))
    assert live.dtype == torch.int32
    assert torch.equal(tiles.unpack(live, tk), mask)


def test_one_bit_a_tile():
    live = tiles.pack(torch.ones(1, 1, 1, 33, dtype=torch.bool))
    assert live.tolist() == [[[[-1, 1]]]]
    assert live.numel() * 4 == 8


@given(tk=st.integers(1, 80), seed=st.integers(0, 10**6))
def test_lists_name_the_live_tiles_in_order(tk, seed):
    mask = torch.rand(1, 2, 3, tk, generator=torch.Generator().manual_seed(seed)) < 0.4
    lists = tiles.make_lists(mask)
    assert lists.count.dtype == lists.index.dtype == torch.int32
    for h in range(2):
        for i in range(3):
            named = lists.index[0, h, i, : lists.count[0, h, i]].tolist()
            assert named == torch.nonzero(mask[0, h, i]).flatten().tolist()


def test_alternating_lists_run_backwards_unless_all_is_live():
    mask = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]], dtype=torch.bool).view(1, 1, 2, 4)
    lists = tiles.make_lists(mask, alternate=True)
    assert lists.index[0, 0].tolist() == [[3, 2, 0, 1], [3, 2, 1, 0]]
    every = torch.ones_like(mask)
    assert torch.equal(tiles.make_lists(every, True).index, tiles.make_lists(every).index)


@pytest.mark.parametrize(
    ("ranges", "touched"),
    [
        ((), [0, 0, 0]),
        (((0, 1),), [1, 0, 0]),
        (((63, 65),), [1, 1, 0]),
        (((64, 128),), [0, 1, 0]),
        (((129, 10_000),), [0, 0, 1]),
        (((150, 200),), [0, 0, 0]),
    ],
)
def test_partly_covered_tiles_count(ranges, touched):
    tokens = policy.pinned_tokens(ranges, None, 130)
    assert tiles.tiles_touching(tokens, 64).int().tolist() == touched


def test_grid_rounds_up():
    assert TileShape(64, 32).grid(65, 65) == (2, 3)
    with pytest.raises(ValueError, match="at least 1 row"):
        TileShape(0, 64)
