"""The calibrated tail: what skipped tiles contribute, against float64 attention."""

import math

import pytest
import torch

from comfyui_liteattention import tail
from comfyui_liteattention.attention import LayerState, attend
from comfyui_liteattention.backends import pooled as pooled_module
from comfyui_liteattention.backends.base import Inputs, Skipped
from comfyui_liteattention.backends.pooled import (
    Agreement,
    add_skipped,
    compare,
    pool,
    skipped_part,
)
from comfyui_liteattention.backends.reference import ReferenceBackend
from comfyui_liteattention.settings import Settings
from comfyui_liteattention.tiles import TileShape, make_lists, pack

TILE = TileShape(16, 8)
SCALE = 0.3


def tensors(seed, length=75, heads=2, spread=1.0):
    """Queries; keys and values that vary around the means of their tiles by ``spread``."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(1, heads, length, 16, generator=g)
    tiles = -(-length // TILE.k)
    k, v = (
        torch.randn(1, heads, tiles, 1, 16, generator=g)
        + spread * torch.randn(1, heads, tiles, TILE.k, 16, generator=g)
        for _ in "kv"
    )
    return q, *(x.flatten(2, 3)[:, :, :length] for x in (k, v))


def some_live(q, k, seed=0, share=0.6):
    tq, tk = TILE.grid(q.shape[2], k.shape[2])
    g = torch.Generator().manual_seed(seed)
    live = torch.rand(1, q.shape[1], tq, tk, generator=g) < share
    live[..., 0] = True
    return live


def backend():
    return ReferenceBackend(TILE, torch.float32)


def error(out, exact):
    return float((out.double() - exact).norm() / exact.norm())


def exact(q, k, v):
    return ((q.double() @ k.double().mT) * SCALE).softmax(-1) @ v.double()


@pytest.mark.parametrize("length", [75, 80, 9])
def test_tiles_of_equal_keys_lose_nothing(length):
    q, k, v = tensors(1, length, spread=0.0)
    live = some_live(q, k)
    kept = backend().forward(Inputs(q, k, v, SCALE), make_lists(live))
    add_skipped(kept, Skipped(q, pool(k, v, TILE.k), SCALE, pack(live)), torch.ones(1, 2), TILE)
    assert error(kept.out, exact(q, k, v)) < 1e-6


def test_without_skipped_tiles_nothing_changes_to_the_bit():
    q, k, v = tensors(2)
    live = torch.ones_like(some_live(q, k))
    live[0, 1, 2, 3] = False  # one row of tiles, of one head
    kept = backend().forward(Inputs(q, k, v, SCALE), make_lists(live))
    before = kept.out.clone()
    add_skipped(
        kept, Skipped(q, pool(k, v, TILE.k), SCALE, pack(live)), torch.full((1, 2), 1.0), TILE
    )
    changed = (kept.out != before).any(-1)[0]
    assert not changed[0].any()
    assert not changed[1, : 2 * TILE.q].any() and not changed[1, 3 * TILE.q :].any()
    assert changed[1, 2 * TILE.q : 3 * TILE.q].all()


def test_the_part_of_the_skipped_tiles_is_attention_to_their_means():
    q, k, v = tensors(3)
    live = some_live(q, k)
    part = skipped_part(q, pool(k, v, TILE.k), SCALE, live, TILE.q)
    for head, row in [(0, 0), (0, 40), (1, 74)]:
        score, value = [], []
        for j in (~live[0, head, row // TILE.q]).nonzero().flatten().tolist():
            keys, values = (x[0, head, j * TILE.k : (j + 1) * TILE.k].double() for x in (k, v))
            score.append(q[0, head, row].double() @ keys.mean(0) * SCALE + math.log(len(keys)))
            value.append(values.mean(0))
        score, value = torch.stack(score), torch.stack(value)
        torch.testing.assert_close(part.lse[0, head, row].double(), score.logsumexp(0))
        expected = score.softmax(0) @ value
        torch.testing.assert_close(part.out[0, head, row].double(), expected, atol=1e-5, rtol=1e-5)


def test_an_empty_part_is_nothing():
    q, k, v = tensors(4)
    live = torch.ones_like(some_live(q, k))
    part = skipped_part(q, pool(k, v, TILE.k), SCALE, live, TILE.q)
    assert (part.lse == -math.inf).all() and (part.out == 0).all()
    kept = backend().forward(Inputs(q, k, v, SCALE))
    factor = tail.factor(compare(kept, part, kept))
    assert (factor == 0).all()


@pytest.mark.parametrize("spread", [0.5, 1.0, 2.0])
def test_the_factor_brings_rows_that_were_not_audited_closer_too(spread):
    q, k, v = tensors(5, length=640, spread=spread)
    live = some_live(q, k)
    kept = backend().forward(Inputs(q, k, v, SCALE), make_lists(live))
    pooled = pool(k, v, TILE.k)
    audited = slice(0, 4 * TILE.q)
    part = skipped_part(q[:, :, audited], pooled, SCALE, live[:, :, :4], TILE.q)
    full = backend().forward(Inputs(q[:, :, audited], k, v, SCALE))
    rows = kept._replace(out=kept.out[:, :, audited], lse=kept.lse[:, :, audited])
    factor = tail.factor(compare(rows, part, full))
    truth = exact(q, k, v)[:, :, 4 * TILE.q :]

    def with_factor(factor):
        copy = kept._replace(out=kept.out.clone())
        add_skipped(copy, Skipped(q, pooled, SCALE, pack(live)), factor, TILE)
        return error(copy.out[:, :, 4 * TILE.q :], truth)

    # The mean of exponentials is more than the exponential of the mean.
    assert (factor > 1).all()
    assert with_factor(factor) < with_factor(torch.ones(1, 2)) < with_factor(torch.zeros(1, 2))


def test_a_part_that_does_not_help_gets_no_weight():
    """Values that cancel out within each tile: their means say nothing."""
    q, k, v = tensors(6, length=640)
    v = torch.randn(v.shape, generator=torch.Generator().manual_seed(7))
    v = v.unflatten(2, (-1, TILE.k))
    v = (v - v.mean(3, keepdim=True)).flatten(2, 3)
    live = some_live(q, k)
    kept = backend().forward(Inputs(q, k, v, SCALE), make_lists(live))
    pooled = pool(k, v, TILE.k)
    part = skipped_part(q, pooled, SCALE, live, TILE.q)
    # What is missing is then only that the kept part weighs too much, and a mean of zero says that.
    factor = tail.factor(compare(kept, part, backend().forward(Inputs(q, k, v, SCALE))))
    before = error(kept.out, exact(q, k, v))
    add_skipped(kept, Skipped(q, pooled, SCALE, pack(live)), factor, TILE)
    assert error(kept.out, exact(q, k, v)) < before


def test_old_audits_fade():
    seen = Agreement(torch.full((1, 1), 100.0), torch.full((1, 1), 100.0))
    q, k, v = tensors(8, length=160, heads=1)
    live = some_live(q, k)
    kept = backend().forward(Inputs(q, k, v, SCALE), make_lists(live))
    part = skipped_part(q, pool(k, v, TILE.k), SCALE, live, TILE.q)
    full = backend().forward(Inputs(q, k, v, SCALE))
    fresh = tail.factor(compare(kept, part, full))
    for _ in range(60):
        seen = tail.enter_audit(seen, compare(kept, part, full))
    assert float(tail.factor(seen)) == pytest.approx(float(fresh), rel=1e-3)


@pytest.mark.parametrize("huge", [30.0, 300.0])
def test_huge_scores_stay_finite(huge):
    q, k, v = tensors(9)
    q = q * huge
    live = some_live(q, k)
    kept = backend().forward(Inputs(q, k, v, SCALE), make_lists(live))
    pooled = pool(k, v, TILE.k)
    part = skipped_part(q, pooled, SCALE, live, TILE.q)
    factor = tail.factor(compare(kept, part, backend().forward(Inputs(q, k, v, SCALE))))
    assert torch.isfinite(factor).all()
    add_skipped(kept, Skipped(q, pooled, SCALE, pack(live)), factor, TILE)
    assert torch.isfinite(kept.out).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_as_attention_does(dtype):
    q, k, v = tensors(10, length=320, spread=0.0)
    live = some_live(q, k)
    half = [x.to(dtype) for x in (q, k, v)]
    kept = ReferenceBackend(TILE, torch.float32).forward(Inputs(*half, SCALE), make_lists(live))
    add_skipped(
        kept, Skipped(half[0], pool(*half[1:], TILE.k), SCALE, pack(live)), torch.ones(1, 2), TILE
    )
    dense = torch.nn.functional.scaled_dot_product_attention(*half, scale=SCALE)
    truth = exact(*half)
    assert kept.out.dtype == dtype
    assert error(kept.out, truth) < 2 * error(dense, truth) + 1e-4


def test_many_parts_are_one(monkeypatch):
    q, k, v = tensors(11)
    live = some_live(q, k)
    pooled, factor = pool(k, v, TILE.k), torch.full((1, 2), 1.5)
    results = []
    for part in (pooled_module.PART, 1):
        monkeypatch.setattr(pooled_module, "PART", part)
        kept = backend().forward(Inputs(q, k, v, SCALE), make_lists(live))
        add_skipped(kept, Skipped(q, pooled, SCALE, pack(live)), factor, TILE)
        results.append(kept.out)
    torch.testing.assert_close(*results)


def test_a_layer_uses_it_and_stays_closer_to_dense():
    q, k, v = tensors(12, length=320)
    live = pack(some_live(q, k))
    errors = {}
    for on in (False, True):
        state = LayerState(live=live.clone())
        settings = Settings(threshold=-39.0, order="raster", audit=20, tail=on)
        for _ in range(4):
            out, tally = attend(state, backend(), Inputs(q, k, v, SCALE), settings, 1.0)
        errors[on] = error(out, exact(q, k, v))
        assert tally.lost is not None and tally.lost > 0.05
        assert (state.fit is not None) is on
    assert errors[True] < 0.8 * errors[False]
