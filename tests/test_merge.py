"""Attention to chunks of the keys, merged, is attention to all of them."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from comfyui_liteattention.backends.merge import merge


def attention(q, k, v):
    """``out [B, H, L, D]`` and ``lse [B, H, L]``."""
    scores = q @ k.mT / q.shape[-1] ** 0.5
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def problem(keys, dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(keys)
    shapes = (2, 3, 5, 8), (2, 3, keys, 8), (2, 3, keys, 8)
    q, k, v = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    return q * scale, k, v


@settings(deadline=None)
@given(cuts=st.lists(st.integers(1, 16), max_size=3, unique=True), scale=st.sampled_from([1, 1e3]))
def test_merged_chunks_are_the_whole(cuts, scale):
    """Also with scores so large that their exponentials overflow."""
    q, k, v = problem(17, scale=scale)
    edges = [0, *sorted(cuts), 17]
    chunks = [attention(q, k[:, :, a:b], v[:, :, a:b]) for a, b in pairwise(edges)]
    out, lse = chunks[0]
    for chunk in chunks[1:]:
        out, lse = merge(out, lse, *chunk)
    whole, whole_lse = attention(q, k, v)
    torch.testing.assert_close(out, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, whole_lse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("first", [True, False])
def test_a_chunk_without_keys_changes_nothing(first):
    """Its LSE is -inf, and its output may be anything, also not a number."""
    out, lse = attention(*problem(7))
    nothing = torch.full_like(out, torch.nan), torch.full_like(lse, -torch.inf)
    parts = (*nothing, out, lse) if first else (out, lse, *nothing)
    merged, merged_lse = merge(*parts)
    assert torch.equal(merged, out) and torch.equal(merged_lse, lse)


def test_two_chunks_without_keys_are_one():
    out = torch.full((1, 1, 2, 4), torch.nan)
    lse = torch.full((1, 1, 2), -torch.inf)
    merged, merged_lse = merge(out, lse, out, lse)
    assert torch.equal(merged, torch.zeros_like(out)) and torch.equal(merged_lse, lse)


def test_rows_are_merged_one_by_one():
    q, k, v = problem(6)
    out, lse = attention(q, k[:, :, :4], v[:, :, :4])
    other, other_lse = attention(q, k[:, :, 4:], v[:, :, 4:])
    other_lse[:, :, 1] = -torch.inf
    merged, _ = merge(out, lse, other, other_lse)
    whole, _ = attention(q, k, v)
    assert torch.equal(merged[:, :, 1], out[:, :, 1])
    torch.testing.assert_close(merged[:, :, 2:], whole[:, :, 2:], rtol=1e-12, atol=1e-12)


def test_half_precision_is_merged_in_full():
    q, k, v = problem(32)
    chunks = [attention(q, k[:, :, at : at + 8], v[:, :, at : at + 8]) for at in range(0, 32, 8)]
    out, lse = (t.float() for t in chunks[0])
    out = out.bfloat16()
    for other, other_lse in chunks[1:]:
        out, lse = merge(out, lse, other.bfloat16(), other_lse.float())
    assert out.dtype == torch.float32 and lse.dtype == torch.float32
    whole = attention(q, k, v)[0].float()
    # bfloat16 keeps 8 bits of every chunk.
    assert (out - whole).abs().max() < 2**-8 * v.abs().max()


def test_a_row_that_is_no_number_stays_one():
    (out, lse), other = attention(*problem(5)), attention(*problem(7))
    out[0, 0, 2], lse[0, 0, 2] = torch.nan, torch.nan
    merged, total = merge(out, lse, *other)
    assert merged[0, 0, 2].isnan().all() and total[0, 0, 2].isnan()
    assert merged.isnan().sum() == merged.shape[-1]
