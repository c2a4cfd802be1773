"""The INT8 mode: kernels in the Triton interpreter against their twin, the twin against float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from comfyui_liteattention.backends.base import Inputs
from comfyui_liteattention.backends.gpu import launches, qk_int8
from comfyui_liteattention.backends.gpu.kernel_table import HEAD_DIMS, TILE
from comfyui_liteattention.backends.gpu.qk_int8 import Int8Reference
from comfyui_liteattention.backends.reference import ReferenceBackend
from comfyui_liteattention.backends.tile_map import mark
from comfyui_liteattention.policy import lost_mass
from comfyui_liteattention.tiles import make_lists

pytest.importorskip("triton", reason="triton isn't installed, so there is no kernel to interpret")

from interpreted_kernel import InterpreterBackend, interpret, why_not
from running_scores import running_scores

interpreted = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

KERNEL, TWIN, TRUTH = InterpreterBackend("int8"), Int8Reference(TILE), ReferenceBackend(TILE)
DTYPES = (torch.float16, torch.bfloat16)


def draw(b=1, h=2, lq=200, lk=330, d=64, dtype=torch.bfloat16, common=2.0, seed=0):
    """Keys that have ``common`` times their own size in common."""
    random = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(b, length, h, d, generator=random).transpose(1, 2) for length in (lq, lk, lk)
    )
    k = k + common * torch.randn(b, h, 1, d, generator=random)
    return tuple(x.to(dtype) for x in (q, k, v))


def draw_mask(q: Tensor, k: Tensor, kept=0.5) -> Tensor:
    random = torch.Generator().manual_seed(1)
    mask = torch.rand(*q.shape[:2], *TILE.grid(q.shape[2], k.shape[2]), generator=random) < kept
    mask[..., 1 % mask.shape[-1]] = True
    return mask


def relative_error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def doubled(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.double() for x in tensors)


def check(q, k, v, mask=None, criterion="mass", atol=2e-3):
    """The kernels against the twin: whatever differs beyond rounding is a fault of theirs."""
    scale = q.shape[-1] ** -0.5
    lists = None if mask is None else make_lists(mask)
    got = KERNEL.forward(Inputs(q, k, v, scale), lists, criterion)
    # The very tensors, so that the means are the same to the bit: rounding is a matter of those.
    want = TWIN.forward(Inputs(q, k, v, scale), lists, criterion)
    plain = relative_error(scaled_dot_product_attention(q, k, v, scale=scale), dense_truth(q, k, v))
    assert relative_error(got.out, want.out) <= 2 * plain + 5e-4
    # Float32 has 24 bits of the largest score, which the keys' mean can take away again.
    atol = max(atol, 2**-20 * want.lse.abs().max().item())
    assert torch.allclose(got.lse, want.lse, rtol=1e-5, atol=atol)
    visited = want.score > -100
    assert (got.score >= want.score - 0.05)[visited].all() and (got.score <= 0).all()
    assert not (got.score > -math.inf)[want.score == -math.inf].any()
    return got


def dense_truth(q, k, v) -> Tensor:
    return TRUTH.forward(Inputs(*doubled(q, k, v), q.shape[-1] ** -0.5)).out


# ---- the kernels --------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("d", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantising_matches_its_twin(d, dtype):
    q, k, v = draw(b=2, d=d, dtype=dtype)
    call = launches.prepare(Inputs(q, k, v, 0.2), None, None, qk="int8")
    for launch in call.launches[:2]:
        interpret(launch)
    mean = qk_int8.mean_key(k)
    queries, keys = qk_int8.quantise_queries(q, mean, 0.2), qk_int8.quantise_keys(k, mean, TILE.k)
    arguments = call.launches[2].arguments
    q8, k8 = arguments[:2]
    q_unit, k_unit, shift = arguments[8:11]
    for got, want in ((q8, queries.values), (k8, keys.values)):
        assert torch.equal(got, want) and want.abs().max() == 127
    for got, want in ((q_unit, queries.unit), (k_unit, keys.unit)):
        assert torch.allclose(got, want, rtol=1e-5, atol=0)
    assert torch.allclose(shift, queries.shift, rtol=1e-4, atol=1e-4)


@interpreted
@pytest.mark.parametrize("d", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("skips", [False, True], ids=["dense", "lists"])
def test_attention_matches_its_twin(d, dtype, skips):
    q, k, v = draw(d=d, dtype=dtype)
    check(q, k, v, draw_mask(q, k) if skips else None)


@interpreted
@pytest.mark.parametrize(("lq", "lk"), [(1, 1), (127, 63), (129, 65), (64, 321)])
def test_ragged_ends(lq, lk):
    check(*draw(h=1, lq=lq, lk=lk))


@interpreted
@pytest.mark.parametrize("criterion", [None, "mass", "gap"])
def test_naming_every_tile_is_dense_bit_for_bit(criterion):
    q, k, v = draw()
    everything = make_lists(torch.ones(1, 2, *TILE.grid(200, 330), dtype=torch.bool))
    dense = KERNEL.forward(Inputs(q, k, v, 0.125))
    got = KERNEL.forward(Inputs(q, k, v, 0.125), everything, criterion)
    assert torch.equal(got.out, dense.out) and torch.equal(got.lse, dense.lse)


@interpreted
def test_layouts_need_no_copy():
    q, k, v = draw()
    want = KERNEL.forward(Inputs(*(x.contiguous() for x in (q, k, v)), 0.125), None, "mass")
    got = KERNEL.forward(Inputs(q, k, v, 0.125), None, "mass")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@interpreted
@pytest.mark.parametrize("criterion", ["mass", "gap"])
@pytest.mark.parametrize(
    "case", ["huge", "tiny", "equal keys", "spike", "far below zero", "an outlying channel"]
)
def test_adversarial_scores(case, criterion):
    q, k, v = draw(h=1, lq=130, lk=300)
    if case == "huge":
        q, k = 30 * q, 30 * k
    if case == "tiny":
        q = 1e-6 * q
    if case == "equal keys":
        k = torch.ones_like(k)
    if case == "spike":
        k[:, :, 250] = 40 * q[:, :, 3]
    if case == "far below zero":
        q, k = q.abs() * 20, -k.abs() * 20
    if case == "an outlying channel":
        q[..., 5], k[..., 5] = 30 * q[..., 5], 30 * k[..., 5]
    got = check(q, k, v, draw_mask(q, k, 0.8), criterion)
    assert got.out.isfinite().all() and got.lse.isfinite().all()


@interpreted
def test_the_largest_sums_are_exact():
    """127 * 127 * 128, either sign: the integers of the kernel's shortcut to float32."""
    q, k, v = (torch.ones(1, 1, length, 128, dtype=torch.float16) for length in (4, 128, 128))
    k[:, :, ::2] = -1
    q[:, :, 0] = -1
    v[:, :, ::2] = 0
    got = KERNEL.forward(Inputs(q, k, v, 0.01))
    want = TRUTH.forward(Inputs(*doubled(q, k, v), 0.01))
    assert torch.allclose(got.out.double(), want.out, rtol=1e-3)
    assert torch.allclose(got.lse, want.lse, rtol=1e-6)


@interpreted
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["q", "k"])
def test_what_is_not_finite_comes_out_as_such(where, value):
    """8 bits have no such values; a run must see that something is wrong all the same."""
    q, k, v = draw(h=1)
    (q if where == "q" else k)[0, 0, 17, 3] = value
    out = KERNEL.forward(Inputs(q, k, v, 0.125)).out
    assert out[0, 0, 17].isnan().all()
    if where == "q":
        assert out[0, 0, :17].isfinite().all() and out[0, 0, 18:].isfinite().all()


@interpreted
def test_an_audit_compares_like_with_like():
    """Some rows in full, as the audit computes them: the very rows of the whole call, and the
    sparse call's LSE lies below by the lost mass."""
    q, k, v = draw(lq=384)
    mask = draw_mask(q, k, 0.6)
    rows = slice(128, 256)
    dense = KERNEL.forward(Inputs(q, k, v, 0.125))
    audit = KERNEL.forward(Inputs(q[:, :, rows], k, v, 0.125))
    assert torch.equal(audit.out, dense.out[:, :, rows])
    assert torch.equal(audit.lse, dense.lse[:, :, rows])
    sparse = KERNEL.forward(Inputs(q, k, v, 0.125), make_lists(mask))
    got = lost_mass(sparse.lse[:, :, rows], audit.lse)
    truth, truth_sparse = (
        TRUTH.forward(Inputs(*doubled(q, k, v), 0.125), lists) for lists in (None, make_lists(mask))
    )
    want = lost_mass(truth_sparse.lse[:, :, rows], truth.lse[:, :, rows])
    assert (got - want).abs().max() < 5e-3


@interpreted
def test_the_same_tiles_are_marked():
    """As by the truth's scores, except where those lie within rounding of the threshold."""
    q, k, v = draw(lq=256, lk=650, common=0.0)
    q = 2 * q
    fading = 3 * 0.6 ** torch.arange(11)
    k = (k * fading.repeat_interleave(TILE.k)[:650, None]).to(k.dtype)
    everything = make_lists(torch.ones(1, 2, *TILE.grid(256, 650), dtype=torch.bool))
    want = running_scores(q, k, 0.125, everything, TILE, "mass").float()
    got = KERNEL.forward(Inputs(q, k, v, 0.125), None, "mass").score
    pinned = torch.zeros(TILE.grid(256, 650), dtype=torch.bool)
    for threshold in (-6.0, -4.0, -2.0):
        here, there = (mark(None, score, threshold, pinned) for score in (got, want))
        assert 0 < there.float().mean() < 1
        assert ((want - threshold).abs() < 0.15)[here != there].all()


# ---- the method ---------------------------------------------------------------------------------


quantise_queries = qk_int8.quantise_queries


def per_query_tile(q: Tensor, mean: Tensor, scale: float) -> qk_int8.Queries:
    """As SageAttention quantises the queries: one unit for a whole tile."""
    ours = quantise_queries(q, mean, scale)
    tiles = torch.nn.functional.pad(q.float().abs(), (0, 0, 0, -q.shape[2] % TILE.q))
    largest = tiles.unflatten(2, (-1, TILE.q)).amax((-1, -2)).repeat_interleave(TILE.q, -1)
    largest = largest[..., : q.shape[2]]
    values = (q.float() * (127 / largest).unsqueeze(-1) + 0.5).floor().to(torch.int8)
    return ours._replace(values=values, unit=largest * (scale * math.log2(math.e) / 127))


@pytest.mark.parametrize("case", ["random", "common", "uneven rows", "peaked"])
def test_no_less_precise_than_sage_attention(case, monkeypatch):
    q, k, v = draw(lq=256, lk=640, d=128, common=5.0 if case == "common" else 0.0)
    if case == "uneven rows":
        q = (q * torch.logspace(-1, 0.5, 256).unsqueeze(-1)).to(q.dtype)
    if case == "peaked":
        q = 3 * q
    truth = dense_truth(q, k, v)
    ours = relative_error(TWIN.forward(Inputs(*doubled(q, k, v), 128**-0.5)).out, truth)
    monkeypatch.setattr(qk_int8, "quantise_queries", per_query_tile)
    sage = relative_error(TWIN.forward(Inputs(*doubled(q, k, v), 128**-0.5)).out, truth)
    assert ours <= sage
    assert ours < {"random": 0.012, "common": 0.012, "uneven rows": 0.025, "peaked": 0.035}[case]


def test_what_keys_have_in_common_costs_no_precision(monkeypatch):
    q, k, v = draw(d=128, common=5.0)
    truth = dense_truth(q, k, v)
    smoothed = relative_error(TWIN.forward(Inputs(*doubled(q, k, v), 128**-0.5)).out, truth)
    monkeypatch.setattr(qk_int8, "mean_key", lambda k: torch.zeros_like(k[:, :, 0]).float())
    assert (
        relative_error(TWIN.forward(Inputs(*doubled(q, k, v), 128**-0.5)).out, truth) > 3 * smoothed
    )


def test_the_lse_is_that_of_the_unshifted_keys():
    q, k, v = draw(common=5.0)
    got = TWIN.forward(Inputs(*doubled(q, k, v), 0.125)).lse
    assert (got - TRUTH.forward(Inputs(*doubled(q, k, v), 0.125)).lse).abs().max() < 0.02
